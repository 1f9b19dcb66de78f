"""Codex and Claude Code against a stack of one's own, in a network namespace without a way out:
does each complete a loop of a tool?

    npm install --prefix DIRECTORY @openai/codex @anthropic-ai/claude-code
    python scripts/agents_without_network.py DIRECTORY [--device cpu] [--agent codex]

The demo model neither calls tools by itself nor ends its texts soon, so a proxy between agent and
server forces the first turn: one tool, whose arguments can only be a harmless command; and lets the
later turns say one of two sentences. A loop is complete when a later request brings what the
command printed, and the agent ends in order. Not part of the tests: the two programs are 200 MB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, NamedTuple

PRINTED: Final = "pagewire-was-here-"
COMMAND: Final = f"echo {PRINTED}$((40 + 2))"
EXPECTED: Final = f"{PRINTED}42"
"""What the command prints; no request has it before the command was run."""
FIRST_TOKENS: Final = 512
LATER_TOKENS: Final = 64
ANSWER: Final = {"enum": ["The command printed a word.", "I have run the command."]}
"""What the later turns may say, as a JSON schema: texts of this model have no end."""
AGENT_S: Final = 400.0
START_S: Final = 300.0
ASK: Final = "Run the command, then say what it printed."


class AgentKind(NamedTuple):
    """How one program is started, and what its requests are called."""

    path: str
    """Of the API that it speaks."""
    program: str
    """Under the directory of node's modules."""
    tools: tuple[str, ...]
    """Tools that run a command; the first that it offers is the one that is forced."""


AGENTS: Final = {
    "codex": AgentKind(
        "/v1/responses", ".bin/codex", ("exec_command", "shell_command", "shell", "local_shell")
    ),
    "claude": AgentKind("/v1/messages", ".bin/claude", ("Bash",)),
}


class Forcing:
    """Changes requests so that the first turn calls the tool."""

    def __init__(self, kind: AgentKind) -> None:
        self.kind = kind
        self.has_result = False
        """A request brought what the command printed."""
        self.requests = 0

    def change(self, body: dict[str, Any]) -> dict[str, Any]:
        """The request as the server gets it."""
        self.requests += 1
        if EXPECTED in json.dumps(body):
            self.has_result = True
        tools = [
            tool for tool in _flat(body.get("tools") or []) if tool.get("name") in self.kind.tools
        ]
        limit = "max_tokens" if self.kind.path == "/v1/messages" else "max_output_tokens"
        if self.has_result or not tools:
            body.pop("tools", None)
            body.pop("tool_choice", None)
            body[limit] = LATER_TOKENS
            form = {"type": "json_schema", "name": "answer", "schema": ANSWER}
            if self.kind.path == "/v1/messages":
                body["output_config"] = {"format": form}
            else:
                body["text"] = {"format": form}
            return body
        tool = dict(tools[0])
        schema = "input_schema" if "input_schema" in tool else "parameters"
        tool[schema] = _only_command(tool[schema])
        tool.pop("strict", None)
        body["tools"] = [tool]
        body[limit] = FIRST_TOKENS
        if self.kind.path == "/v1/messages":
            body["tool_choice"] = {"type": "any", "disable_parallel_tool_use": True}
        else:
            body["tool_choice"] = "required"
            body["parallel_tool_calls"] = False
        return body


def _flat(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tools in namespaces as all others."""
    flat: list[dict[str, Any]] = []
    for tool in tools:
        flat += _flat(tool["tools"]) if tool.get("type") == "namespace" else [tool]
    return flat


def _only_command(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with the command as the one value that is possible."""
    name = next(key for key in ("cmd", "command") if key in schema["properties"])
    is_list = schema["properties"][name].get("type") == "array"
    value: Any = ["bash", "-c", COMMAND] if is_list else COMMAND
    properties = {name: {"const": value}}
    if "description" in schema["properties"] and "description" in schema.get("required", []):
        properties["description"] = {"const": "Print a word"}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def proxy_of(server: str, forcing: Forcing) -> ThreadingHTTPServer:
    """A proxy to `server` at a free port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path.partition("?")[0] == forcing.kind.path:
                data = json.dumps(forcing.change(json.loads(data))).encode()
            self._pass_on(data)

        def do_GET(self) -> None:
            self._pass_on(None)

        def do_HEAD(self) -> None:
            self._pass_on(None)

        def _pass_on(self, data: bytes | None) -> None:
            request = urllib.request.Request(server + self.path, data, method=self.command)
            request.add_header("Content-Type", "application/json")
            try:
                answer = urllib.request.urlopen(request, timeout=AGENT_S)
            except urllib.error.HTTPError as error:
                answer = error
                print(f"    {self.command} {self.path}: {error.code}", file=sys.stderr)
            with answer:
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
                self.end_headers()
                while piece := answer.read1(65_536):
                    self.wfile.write(piece)
                    self.wfile.flush()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    return proxy


def start_server(device: str) -> tuple[subprocess.Popen[str], str]:
    """A stack with the demo model, and where it is."""
    flags = [
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--device",
        device,
        "--served-model-name",
        "demo",
    ]
    if device == "fake":
        flags += ["--fake-eos-token-id", "2", "--max-model-len", "65536"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pagewire", "serve", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if " at http" in line:
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return process, line.rpartition(" at ")[2].strip().removesuffix("/v1")
    raise SystemExit("the stack did not start:\n" + "".join(lines))


def command_of(name: str, program: Path, url: str, home: Path) -> tuple[list[str], dict[str, str]]:
    """The agent's command line and environment."""
    environment = {
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "NO_COLOR": "1",
        "IS_SANDBOX": "1",
    }
    if name == "claude":
        environment |= {
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_API_KEY": "EMPTY",
            "ANTHROPIC_MODEL": "demo",
            "ANTHROPIC_SMALL_FAST_MODEL": "demo",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_TELEMETRY": "1",
            "DISABLE_AUTOUPDATER": "1",
        }
        return [str(program), "-p", ASK, "--dangerously-skip-permissions"], environment
    provider = f'{{name="p", base_url="{url}/v1", env_key="KEY", wire_api="responses"}}'
    return [
        str(program), "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox",
        "-c", f"model_providers.p={provider}", "-c", 'model_provider="p"', "-m", "demo", ASK,
    ], {**environment, "KEY": "EMPTY"}  # fmt: skip


def loop_of(name: str, modules: Path, server: str) -> bool:
    """Whether the agent completes a loop."""
    kind = AGENTS[name]
    forcing = Forcing(kind)
    proxy = proxy_of(server, forcing)
    url = f"http://127.0.0.1:{proxy.server_address[1]}"
    with tempfile.TemporaryDirectory(prefix="agent-") as home:
        command, environment = command_of(name, modules / kind.program, url, Path(home))
        done = subprocess.run(
            command,
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=AGENT_S,
        )
    proxy.shutdown()
    is_complete = done.returncode == 0 and forcing.has_result
    print(
        f"{name}: exit status {done.returncode}, {forcing.requests} requests, "
        f"{'the result of the tool came back' if forcing.has_result else 'no result of a tool'}"
    )
    if not is_complete:
        print(done.stdout[-2000:], done.stderr[-2000:], sep="\n")
    return is_complete


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="where npm installed the agents")
    parser.add_argument(
        "--device", default="cpu", help="of the stack: cpu, or fake for a hash function"
    )
    parser.add_argument("--agent", choices=tuple(AGENTS), action="append", help="default: all")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        inside = [sys.executable, *sys.argv, "--inside"]
        script = 'ip link set lo up && exec "$@"'
        return subprocess.call(["unshare", "-rn", "bash", "-c", script, "agents", *inside])
    modules: Path = options.directory.resolve() / "node_modules"
    process, server = start_server(options.device)
    try:
        outcomes = [loop_of(name, modules, server) for name in options.agent or AGENTS]
    finally:
        process.terminate()
        process.wait(20)
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
