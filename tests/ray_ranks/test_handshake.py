"""Who is let in by the proxy of a rank on another host, and the frames that go over the connection."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pagewire.launch.ray_ranks import handover, handshake, relay
from pagewire.launch.ray_ranks.handover import Hello, Kind, RankProcess, StartRequest
from pagewire.process import frames
from pagewire.process.frames import Frame, FrameStream, FrameTooLong
from pagewire.version import __version__

SECRET = bytes(range(32))


@pytest.fixture
def listening() -> Iterator[tuple[handshake.AuthenticatedListener, int]]:
    listener = handshake.listen("127.0.0.1")
    port = listener.getsockname()[1]
    opened = handshake.AuthenticatedListener(listener, SECRET)
    yield opened, port
    opened.close()


def test_the_one_with_the_secret_is_let_in(
    listening: tuple[handshake.AuthenticatedListener, int],
) -> None:
    opened, port = listening
    actor = handshake.connect("127.0.0.1", port, SECRET)
    proxy = opened.accept(10)
    assert proxy is not None
    actor.send(7, b"after the secret")
    assert proxy.receive() == Frame(7, b"after the secret")
    for option, value in ((socket.TCP_NODELAY, 1), (socket.TCP_USER_TIMEOUT, 10_000)):
        with socket.socket(fileno=os.dup(proxy.fileno())) as connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, option) == value
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert connection.gettimeout() is None
    actor.close()
    assert proxy.receive() is None
    proxy.close()


def test_one_with_another_secret_hears_nothing(
    listening: tuple[handshake.AuthenticatedListener, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, port = listening
    monkeypatch.setattr(handshake, "CONNECT_S", 0.0)
    with pytest.raises(handshake.NoProxy, match=rf"cannot reach 127\.0\.0\.1 port {port}"):
        handshake.connect("127.0.0.1", port, SECRET[::-1])
    assert opened.accept(0.05) is None


def test_garbage_and_silence_keep_nobody_waiting(
    listening: tuple[handshake.AuthenticatedListener, int],
) -> None:
    """Neither as many silent ones as may connect at a time, less one, nor some that say anything."""
    opened, port = listening
    silent = [
        socket.create_connection(("127.0.0.1", port)) for _ in range(handshake.MOST_PENDING - 1)
    ]
    garbage = socket.create_connection(("127.0.0.1", port))
    with garbage, contextlib.suppress(ConnectionResetError):
        garbage.settimeout(10)
        garbage.sendall(os.urandom(4096))
        while garbage.recv(64):
            pass
    began = time.monotonic()
    actor = handshake.connect("127.0.0.1", port, SECRET)
    proxy = opened.accept(10)
    assert proxy is not None and time.monotonic() - began < handshake.HANDSHAKE_S
    for each in (*silent, actor, proxy):
        each.close()


def test_an_actor_tells_nothing_to_one_that_does_not_know_the_secret() -> None:
    """What listens there answers with what it likes: the actor starts nothing for it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pretend() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(bytes(handshake.NONCE_BYTES))
                connection.recv(handshake.NONCE_BYTES + handshake.PROOF_BYTES)
                connection.sendall(bytes(handshake.PROOF_BYTES))

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(handshake.NoProxy, match="does not know the secret"):
            handshake.connect("127.0.0.1", listener.getsockname()[1], SECRET)
        thread.join()


def test_the_driver_hands_a_proxy_what_to_listen_at(tmp_path: Path) -> None:
    """Also one that listens only after a while."""
    path = tmp_path / "life.1"
    with handshake.listen("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        driver = threading.Thread(
            target=handshake.hand_listener, args=(path, listener, SECRET), daemon=True
        )
        driver.start()
        time.sleep(0.05)
        with handover.listening(handshake.listener_path(path)) as offers:
            opened = handshake.take_listener(offers.accept()[0])
        driver.join()
    actor = handshake.connect("127.0.0.1", port, SECRET)
    proxy = opened.accept(10)
    assert proxy is not None
    opened.close()
    for each in (actor, proxy):
        each.close()


def test_a_proxy_that_does_not_listen_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "CONNECT_S", 0.0)
    with (
        handshake.listen("127.0.0.1") as listener,
        pytest.raises(handshake.NoProxy, match=r"does not listen at .*/life\.1\.tcp"),
    ):
        handshake.hand_listener(tmp_path / "life.1", listener, SECRET)


def test_an_address_that_is_not_this_machine_s_is_named() -> None:
    with pytest.raises(OSError, match=r"listening at 192\.0\.2\.200, by which Ray knows it"):
        handshake.listen("192.0.2.200")


def pair() -> tuple[FrameStream, FrameStream]:
    return tuple(map(FrameStream, socket.socketpair()))  # type: ignore[return-value]


def test_frames_arrive_whole_in_their_order() -> None:
    one, other = pair()
    sent = [Frame(kind % 256, os.urandom(length)) for kind, length in enumerate((0, 1, 70_000, 5))]
    thread = threading.Thread(target=lambda: [one.send(*frame) for frame in sent])
    thread.start()
    assert [other.receive() for _ in sent] == sent
    thread.join()
    assert list(other.available()) == []
    one.send(1, b"a")
    one.send(2, b"b")
    assert list(other.available()) == [Frame(1, b"a"), Frame(2, b"b")]
    one.shut()
    assert other.receive() is None
    for each in (one, other):
        each.close()


def test_a_frame_that_is_too_long_ends_the_connection() -> None:
    one, other = socket.socketpair()
    one.sendall(frames._HEAD.pack(1, frames.MOST_BYTES + 1))
    with pytest.raises(FrameTooLong), other:
        FrameStream(other).receive()
    one.close()


def test_another_version_on_another_host_is_named() -> None:
    proxy, actor = pair()
    actor.send(Kind.HELLO, Hello("0.0.9", "node-b").encode())
    line = f"node-b has Pagewire 0.0.9, and this machine {__version__}: install one version on all hosts"
    with pytest.raises(relay.UnlikeVersions, match=line):
        relay.receive_hello(proxy)
    actor.send(Kind.HELLO, Hello(__version__, "node-b").encode())
    hello = relay.receive_hello(proxy)
    assert hello is not None and hello.host == "node-b"
    actor.close()
    assert relay.receive_hello(proxy) is None
    proxy.close()


def test_an_order_says_what_to_start_and_carries_no_secrets() -> None:
    process = RankProcess(("python", "-m"), "/here", {"PAGEWIRE_A": "\udcff"}, "1/2/life/3,4,5/w")
    request = StartRequest(process, 5, "ipc:///run/worker.sock")
    assert StartRequest.decode(request.encode()) == request
    here = {
        "PAGEWIRE_TEST": "1", "NCCL_DEBUG": "INFO", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "4",
        "PAGEWIRE_API_KEY": "secret", "HF_TOKEN": "secret", "CUDA_VISIBLE_DEVICES": "0",
        "HF_HOME": "/models", "CUDA_HOME": "/cuda", "TRITON_CACHE_DIR": "/here",
        "PATH": "/bin", "HOME": "/root", "LD_LIBRARY_PATH": "/lib", "AWS_SECRET_ACCESS_KEY": "secret",
    }  # fmt: skip
    kept = ["PAGEWIRE_TEST", "NCCL_DEBUG", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"]
    assert list(handover.carried(here)) == kept
