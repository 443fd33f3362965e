"""The released weights' download against a local server that speaks the Hub's protocol, with its faults."""

import errno
import hashlib
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tim_core import TimError
from tim_core.cli import main
from tim_core.weights import download

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Files by repository and name; faults by name; a log of (method, path, range)."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.status: dict[str, tuple[int, str]] = {}   # path -> status, X-Error-Code
        self.cuts: dict[str, list[int]] = {}           # path -> after how many bytes the next answers break off
        self.hash: dict[str, str] = {}                 # path -> an announced sha256 that is not the file's
        self.log: list[tuple[str, str, str | None]] = []

    def add(self, repository: str, name: str, data: bytes) -> str:
        path = f"/{repository}/resolve/main/{name}"
        self.files[path] = data
        return path

    def serve(self) -> ThreadingHTTPServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, body: bool):
                path = self.path.split("?")[0].replace(f"/resolve/{COMMIT}/", "/resolve/main/")
                hub.log.append((self.command, path, self.headers.get("Range")))
                status, code = hub.status.get(path, (200, ""))
                if status == 200 and path not in hub.files:
                    status, code = 404, "EntryNotFound"
                if status != 200:
                    self.send_response(status)
                    self.send_header("X-Error-Code", code)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                data = hub.files[path]
                start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[1])
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(data) - start))
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("X-Repo-Commit", COMMIT)
                sha256 = hub.hash.get(path) or hashlib.sha256(data).hexdigest()
                self.send_header("ETag", f'"{sha256}"')
                self.send_header("X-Linked-Etag", f'"{sha256}"')
                self.send_header("X-Linked-Size", str(len(data)))
                self.end_headers()
                if body:
                    rest = data[start:]
                    if hub.cuts.get(path):
                        self.wfile.write(rest[: hub.cuts[path].pop(0)])
                        self.wfile.flush()
                        self.close_connection = True
                        self.connection.shutdown(socket.SHUT_RDWR)
                        return
                    self.wfile.write(rest)

            def do_HEAD(self):
                self.answer(False)

            def do_GET(self):
                self.answer(True)

        return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with every file of the releases, small, under sizes and hashes that the releases are made to expect."""
    hub = Hub()
    releases = {}
    for name, assets in download.RELEASES.items():
        changed = []
        for asset in assets:
            data = hashlib.sha256(asset.place.encode()).digest() * 5000
            for repository in filter(None, (asset.source.repository, asset.source.mirror)):
                hub.add(repository, asset.name, data)
            known = asset.sha256 and hashlib.sha256(data).hexdigest()
            changed.append(download.Asset(asset.source, asset.name, asset.place, asset.standalone, asset.size and len(data), known))
        releases[name] = tuple(changed)
    monkeypatch.setattr(download, "RELEASES", releases)
    server = hub.serve()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True, raising=False)
    yield hub
    server.shutdown()
    server.server_close()


def paths(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_a_folder_for_the_command_line(hub, tmp_path):
    made = download.fetch(download.plan("t2i", to=tmp_path / "tim"))
    assert paths(tmp_path / "tim") == [
        "text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/tokenizer.json", "transformer/t2i_model.bin",
        "vae/diffusion_pytorch_model.safetensors"]
    for file, sha256 in made:
        assert hashlib.sha256(file.read_bytes()).hexdigest() == sha256
    assert {path.split("/resolve")[0] for _, path, _ in hub.log if "/resolve/" in path} == {
        "/GoodEnough/TiM-T2I", "/google/gemma-3-1b-it", "/mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"}


@pytest.mark.parametrize("release, names", [
    ("t2i", {"diffusion_models/t2i_model.bin", "text_encoders/gemma-3-1b-it/config.json", "text_encoders/gemma-3-1b-it/model.safetensors",
             "text_encoders/gemma-3-1b-it/tokenizer.json", "vae/dc-ae-f32c32-sana-1.1.safetensors"}),
    ("c2i-256", {"diffusion_models/c2i_model_256.safetensors", "vae/sd-vae-ft-ema.safetensors"}),
    ("c2i-512", {"diffusion_models/c2i_model_512.safetensors", "vae/dc-ae-f32c32-sana-1.1.safetensors"}),
])
def test_the_folders_of_comfyui(hub, tmp_path, release, names):
    (tmp_path / "models").mkdir()
    download.fetch(download.plan(release, comfyui=tmp_path))
    assert set(paths(tmp_path / "models")) == names


def test_what_is_there_is_not_fetched_again(hub, tmp_path):
    first = download.fetch(download.plan("c2i-512", to=tmp_path))
    hub.log.clear()
    assert download.fetch(download.plan("c2i-512", to=tmp_path)) == first
    assert all(method == "HEAD" for method, path, _ in hub.log if "/resolve/" in path)


def test_what_is_there_may_be_read_only(hub, tmp_path, monkeypatch):
    first = download.fetch(download.plan("c2i-512", to=tmp_path))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert download.fetch(download.plan("c2i-512", to=tmp_path)) == first
    with pytest.raises(TimError, match="not writable"):
        download.plan("c2i-256", to=tmp_path)


def test_another_file_under_the_name_is_kept(hub, tmp_path):
    other = tmp_path / "transformer" / "c2i_model_512.safetensors"
    other.parent.mkdir()
    other.write_bytes(b"mine")
    with pytest.raises(TimError, match="c2i_model_512.safetensors.*another file"):
        download.plan("c2i-512", to=tmp_path)
    assert other.read_bytes() == b"mine"


def test_a_cut_connection_is_resumed_where_it_broke(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    path = "/GoodEnough/TiM-C2I/resolve/main/c2i_model_512.safetensors"
    hub.cuts[path] = [20_000] + [0] * 100
    with pytest.raises(TimError, match="c2i_model_512.safetensors.*repeat the command to resume"):
        download.fetch(download.plan("c2i-512", to=tmp_path))
    assert not (tmp_path / "transformer" / "c2i_model_512.safetensors").exists()
    hub.cuts.clear()
    hub.log.clear()
    (file, _), *_ = download.fetch(download.plan("c2i-512", to=tmp_path))
    assert file.read_bytes() == hub.files[path]
    ranges = [asked for method, asked_path, asked in hub.log if method == "GET" and asked_path == path]
    assert len(ranges) == 1 and int(re.match(r"bytes=(\d+)-", ranges[0])[1]) >= 20_000
    assert all(not name.rpartition("/")[2].startswith(".") for name in paths(tmp_path))


def test_a_wrong_hash_is_one_error_and_leaves_nothing(hub, tmp_path):
    path = "/GoodEnough/TiM-C2I/resolve/main/c2i_model_256.safetensors"
    hub.hash[path] = "0" * 64
    with pytest.raises(TimError, match="c2i_model_256.safetensors: .*[0-9a-f]{64}.* 0{64}.*deleted"):
        download.fetch(download.plan("c2i-256", to=tmp_path))
    assert not [name for name in paths(tmp_path) if name.endswith("c2i_model_256.safetensors")]


def test_a_changed_file_is_refused_by_its_known_hash(hub, tmp_path):
    path = "/google/gemma-3-1b-it/resolve/main/model.safetensors"
    hub.files[path] = bytes(len(hub.files[path]))
    with pytest.raises(TimError, match="gemma-3-1b-it/model.safetensors: .*sha256.*deleted; repeat the command"):
        download.fetch(download.plan("t2i", to=tmp_path))


@pytest.mark.parametrize("status, code, said", [
    (401, "GatedRepo", "accept the terms on huggingface.co/google/gemma-3-1b-it and run `hf auth login`, or add --mirror"),
    (403, "GatedRepo", "accept the terms on huggingface.co/google/gemma-3-1b-it and run `hf auth login`, or add --mirror"),
    (404, "EntryNotFound", "not found"),
    (500, "", "the server answered 500"),
])
def test_a_refusal_says_what_to_do(hub, tmp_path, status, code, said):
    for path in hub.files:
        if path.startswith("/google/"):
            hub.status[path] = status, code
    with pytest.raises(TimError, match="google/gemma-3-1b-it/config.json: ") as caught:
        download.plan("t2i", to=tmp_path / "tim")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "tim").exists()


def test_the_mirror_needs_no_login(hub, tmp_path):
    for path in hub.files:
        if path.startswith("/google/"):
            hub.status[path] = 401, "GatedRepo"
    download.fetch(download.plan("t2i", to=tmp_path, mirror=True))
    assert (tmp_path / "text_encoder" / "model.safetensors").is_file()
    assert "unsloth/gemma-3-1b-it" in download.terms("t2i", mirror=True) and download.GEMMA_TERMS in download.terms("t2i", mirror=True)
    assert "hf auth login" in download.terms("t2i") and "--mirror" in download.terms("t2i")


def test_too_little_space_is_said_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000})())
    downloads = download.plan("c2i-256", to=tmp_path / "tim")
    hub.log.clear()
    with pytest.raises(TimError, match="needed, 0.0 GB free"):
        download.fetch(downloads)
    assert not hub.log and not (tmp_path / "tim").exists()


def test_a_disk_that_fills_up_is_one_line(hub, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(TimError, match="c2i_model_256.safetensors: .*No space left on device.*repeat the command to resume"):
        download.fetch(download.plan("c2i-256", to=tmp_path))


def test_no_server_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TimError, match="c2i_model_256.safetensors: .*repeat the command to resume"):
        download.plan("c2i-256", to=tmp_path)


@pytest.mark.parametrize("wanted, said", [
    (dict(to=None), "--to FOLDER or --comfyui FOLDER"), (dict(to="a", comfyui="b"), "--to FOLDER or --comfyui FOLDER"),
    (dict(comfyui="nowhere"), "nowhere: .*no models folder"),
])
def test_a_destination_is_asked_for(wanted, said):
    with pytest.raises(TimError, match=said):
        download.plan("t2i", **wanted)


def test_an_unknown_release_names_the_known_ones():
    with pytest.raises(TimError, match="'xl'.*t2i.*c2i-256.*c2i-512"):
        download.plan("xl", to=".")


def test_two_downloads_of_one_file_do_not_mix(hub, tmp_path):
    from filelock import FileLock

    downloads = download.plan("c2i-256", to=tmp_path)
    downloads[0].target.parent.mkdir(parents=True)
    with FileLock(downloads[0].partial.with_suffix(".lock")):
        with pytest.raises(TimError, match="c2i_model_256.safetensors: .*another download"):
            download.fetch(downloads)


def test_another_version_does_not_grow_on_the_old_one(hub, tmp_path):
    path = "/GoodEnough/TiM-C2I/resolve/main/c2i_model_256.safetensors"
    (old, *_) = download.plan("c2i-256", to=tmp_path)
    old.partial.parent.mkdir(parents=True)
    old.partial.write_bytes(b"half of another version")
    hub.files[path] = bytes(1000)
    (file, _), *_ = download.fetch(download.plan("c2i-256", to=tmp_path))
    assert file.read_bytes() == bytes(1000)


def test_the_command_lists_terms_and_then_sums(hub, tmp_path, capsys):
    assert main(["download", "c2i-256", "--to", str(tmp_path), "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "GoodEnough/TiM-C2I" in said.err and "MIT" in said.err and not paths(tmp_path)
    assert len(said.out.splitlines()) == 2 and str(tmp_path / "transformer" / "c2i_model_256.safetensors") in said.out
    assert main(["download", "c2i-256", "--to", str(tmp_path)]) == 0
    for line in capsys.readouterr().out.splitlines():
        sha256, file = line.split("  ")
        assert hashlib.sha256(Path(file).read_bytes()).hexdigest() == sha256


def test_without_a_destination_the_folder_has_the_releases_name(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["download", "c2i-256", "--dry-run"]) == 0
    assert all(line.startswith("tim-c2i-256/") for line in capsys.readouterr().out.splitlines()) and not list(tmp_path.glob("tim-*"))


def test_a_refused_command_is_one_line(hub, tmp_path, capsys):
    hub.status["/google/gemma-3-1b-it/resolve/main/config.json"] = 401, "GatedRepo"
    assert main(["download", "t2i", "--to", str(tmp_path / "tim")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("tim: error: google/gemma-3-1b-it/config.json: ") and "hf auth login" in last
