"""A frontend in its own event loop and thread, on a free port, in front of a scripted stack."""

import asyncio
import contextlib
import json
import ssl
import tempfile
import threading
import time
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
import uvloop
from api.fake_stack import FakeStack, fake_stack
from pagewire.config import FrontendConfig, RunConfig
from pagewire.frontend.auth import Auth
from pagewire.frontend.service import Service
from pagewire.process.listening import listening_socket

MODEL = "/models/tiny one/"


def client_context() -> ssl.SSLContext:
    """Trusts the tests' certificate alone, and shows it."""
    directory = Path(__file__).parent / "tls"
    context = ssl.create_default_context(cafile=str(directory / "cert.pem"))
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    return context


class Frontend:
    def __init__(
        self, run_dir: Path, keys: tuple[str, ...], config: FrontendConfig, names: tuple[str, ...]
    ) -> None:
        self._options = (RunConfig(run_dir=str(run_dir)), names, Auth(keys), config)
        self._started, self._loop = threading.Event(), uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._started.wait(10)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        with contextlib.closing(listening_socket("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
            async with Service(*self._options).serving(listener) as self.service:
                self._started.set()
                await self._stop.wait()
                await self.service.drain()

    def close(self) -> None:
        if not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()


class Server:
    """What a test talks to: the stack's script on one side, clients on the other."""

    def __init__(self, stack: FakeStack, frontend: Frontend, key: str, tls: bool) -> None:
        self.stack, self.frontend = stack, frontend
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{frontend.port}"
        self.http = httpx.Client(
            base_url=self.url, timeout=20, verify=client_context() if tls else True
        )
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key or "EMPTY", max_retries=0, timeout=20
        )

    @property
    def owner(self):
        return self.frontend.service.state.owner

    def post(self, path: str, **body: object):
        return self.http.post(path, json=body)

    def complete(self, prompt: object = "hi", **body: object):
        return self.post("/v1/completions", prompt=prompt, **body)

    def chat(self, text: str = "hi", **body: object):
        return self.post(
            "/v1/chat/completions", messages=[{"role": "user", "content": text}], **body
        )

    def events(self, path: str, **body: object) -> list[object]:
        """The parsed events of a stream; the last must be [DONE]."""
        answer = self.http.post(path, json={"stream": True, **body})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        blocks = answer.text.split("\n\n")
        assert blocks[-2:] == ["data: [DONE]", ""]
        return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]

    def settle(self, condition, seconds: float = 5) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "did not come about in time"
            time.sleep(0.005)

    def wait_health(self, status: int) -> None:
        self.settle(lambda: self.http.get("/health").status_code == status)


@contextlib.contextmanager
def serve(
    keys: tuple[str, ...] = (),
    config: FrontendConfig | None = None,
    names: tuple[str, ...] = (MODEL, "alias"),
    tls: bool = False,
    **options: object,
):
    config = config or FrontendConfig(max_body_mb=1)
    with (
        tempfile.TemporaryDirectory(prefix="pw", dir="/tmp") as name,
        fake_stack(Path(name), **options) as stack,
    ):
        frontend = Frontend(Path(name), keys, config, names)
        server = Server(stack, frontend, keys[0] if keys else "", tls)
        try:
            server.wait_health(200 if stack.ready else 503)
            yield server
        finally:
            server.http.close()
            server.client.close()
            frontend.close()


@pytest.fixture(name="serve")
def serve_fixture():
    return serve


@pytest.fixture(scope="module")
def shared():
    with serve() as server:
        yield server


@pytest.fixture
def server(shared):
    shared.stack.received.clear()
    yield shared
    shared.settle(lambda: len(shared.owner) == 0)
