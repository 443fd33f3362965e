"""Download the released weights from the Hugging Face Hub into the folders that use them.

Files come through huggingface_hub, which transformers installs. A file is fetched under a hidden name beside its destination, where a
second run resumes it, is checked, and then renamed. hf_hub_download is not used: since huggingface_hub 1.0 it starts an interrupted file
again. File names, sizes, hashes and licences: docs/released-weights.md.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import TimError, one_line
from ..files import check_new_output, make_folder, user_path

CHUNK = 1 << 22
GEMMA_TERMS = "https://ai.google.dev/gemma/terms"


@dataclass(frozen=True)
class Source:
    """A repository of the Hub: its licence as its page states it, and an ungated copy of a gated one."""

    repository: str
    licence: str
    mirror: str | None = None

    @property
    def gated(self) -> bool:
        return self.mirror is not None


@dataclass(frozen=True)
class Asset:
    """One file of a release.

    place: path below the models folder of ComfyUI. standalone: path below a folder that `--model` takes.
    size: bytes; sha256: hexadecimal. Both None where they were never published: then the Hub's own answer counts.
    """

    source: Source
    name: str
    place: str
    standalone: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Download:
    """A file to fetch: where from, where to, its size in bytes, its sha256 (None if the Hub gives none), and whether it is there already.

    etag: the Hub's name for this version of the file.
    """

    asset: Asset
    repository: str
    target: Path
    size: int
    sha256: str | None
    etag: str
    present: bool

    @property
    def name(self) -> str:
        return f"{self.repository}/{self.asset.name}"

    @property
    def partial(self) -> Path:
        """Where the file grows; another version of it grows elsewhere."""
        version = hashlib.sha256(f"{self.name} {self.etag}".encode()).hexdigest()[:12]
        return self.target.parent / f".{self.target.name}.{version}.part"


TIM_LICENCE = "not stated on the model card; the code's README says Apache-2.0"
TIM_T2I = Source("GoodEnough/TiM-T2I", TIM_LICENCE)
TIM_C2I = Source("GoodEnough/TiM-C2I", TIM_LICENCE)
GEMMA = Source("google/gemma-3-1b-it", f"Gemma terms, {GEMMA_TERMS}", mirror="unsloth/gemma-3-1b-it")
DC_AE = Source("mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers", "MIT")
SD_VAE = Source("stabilityai/sd-vae-ft-ema", "MIT")

_DC_AE = (Asset(
    DC_AE, "diffusion_pytorch_model.safetensors", "vae/dc-ae-f32c32-sana-1.1.safetensors", "vae/diffusion_pytorch_model.safetensors"),)
_GEMMA = tuple(
    Asset(GEMMA, name, f"text_encoders/gemma-3-1b-it/{name}", f"text_encoder/{name}", size, sha256)
    for name, size, sha256 in (
        ("config.json", None, None),
        ("tokenizer.json", None, "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795"),
        ("model.safetensors", 1_999_811_208, "3d4ef8d71c14db7e448a09ebe891cfb6bf32c57a9b44499ae0d1c098e48516b6"),
    )
)


def _transformer(source: Source, name: str) -> tuple[Asset]:
    return (Asset(source, name, f"diffusion_models/{name}", f"transformer/{name}"),)


RELEASES: dict[str, tuple[Asset, ...]] = {
    "t2i": (*_transformer(TIM_T2I, "t2i_model.bin"), *_GEMMA, *_DC_AE),
    "c2i-256": (
        *_transformer(TIM_C2I, "c2i_model_256.safetensors"),
        Asset(SD_VAE, "diffusion_pytorch_model.safetensors", "vae/sd-vae-ft-ema.safetensors", "vae/sd-vae-ft-ema.safetensors"),
    ),
    "c2i-512": (*_transformer(TIM_C2I, "c2i_model_512.safetensors"), *_DC_AE),
}


def terms(release: str, mirror: bool = False) -> str:
    """The licences of a release, one line per repository, and how to pass the gate of Gemma. TimError for an unknown release."""
    lines = []
    for source in dict.fromkeys(asset.source for asset in _assets(release)):
        lines.append(f"{_repository(source, mirror)}: licence {source.licence}")
        if source.gated and mirror:
            lines.append(f"  a copy of {source.repository}; the terms apply to the copy, too")
        elif source.gated:
            lines.append(f"  needs an account that accepted the terms on huggingface.co/{source.repository} and `hf auth login`;")
            lines.append(f"  or --mirror, for the copy {source.mirror} that asks for no login. The terms apply to both.")
    return "\n".join(lines)


def plan(release: str, to: str | Path | None = None, comfyui: str | Path | None = None, mirror: bool = False) -> list[Download]:
    """The files of a release with their destinations and the sizes that the Hub announces.

    Exactly one of `to` (a folder for `--model`, made if it is not there) and `comfyui` (a ComfyUI folder) is given. TimError for an unknown
    release, a folder that is not ComfyUI's, a file in the way, and what the Hub refuses.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    assets, root = _assets(release), _root(to, comfyui)
    targets = [root / (asset.place if comfyui is not None else asset.standalone) for asset in assets]
    for target in targets:
        if not os.path.isfile(target):  # one that is there is never written over, and its folder may be read-only
            check_new_output(target, ())
    found = []
    for asset, target in zip(assets, targets):
        repository = _repository(asset.source, mirror)
        with _explained(repository, asset, "cannot reach the server"):
            url = hf_hub_url(repository, asset.name, endpoint=_endpoint())
            answer = get_hf_file_metadata(url)
        announced = answer.etag if answer.etag and re.fullmatch(r"[0-9a-f]{64}", answer.etag) else None
        size, sha256 = asset.size or answer.size, asset.sha256 or announced
        if not size:
            raise TimError(f"{repository}/{asset.name}: the server does not say its size; try again later, or set HF_ENDPOINT to another")
        found.append(Download(asset, repository, target, size, sha256, answer.etag or "", _is_present(target, size, sha256)))
    return found


def fetch(downloads: list[Download], report: Callable[[str], None] = lambda line: None) -> list[tuple[Path, str]]:
    """Fetches what is not there yet -> (path, sha256) of each file, those already there included.

    Space is checked before anything is fetched. Every file is compared with its size and sha256 before it gets its name; a damaged one is
    deleted. What an interrupted run left is resumed. report: called with one line per file. TimError names the file and says what to do.
    """
    _check_space(downloads)
    made = []
    for download in downloads:
        if not download.present:
            report(f"{download.name} -> {download.target}")
            _fetch_one(download)
        made.append((download.target, sha256_of(download.target)))
    return made


def sha256_of(file: Path) -> str:
    """The sha256 of a file, in hexadecimal; reads it in chunks."""
    found = hashlib.sha256()
    with open(file, "rb") as opened:
        while chunk := opened.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _assets(release: str) -> tuple[Asset, ...]:
    if release not in RELEASES:
        raise TimError(f"release: {release!r} is unknown; choose {', '.join(RELEASES)}")
    return RELEASES[release]


def _repository(source: Source, mirror: bool) -> str:
    return source.mirror if mirror and source.mirror else source.repository


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _root(to: str | Path | None, comfyui: str | Path | None) -> Path:
    if (to is None) == (comfyui is None):
        raise TimError("download: name one destination, --to FOLDER or --comfyui FOLDER")
    if to is not None:
        return user_path(to)
    folder = user_path(comfyui)
    if not (folder / "models").is_dir():
        raise TimError(f"{folder}: not a ComfyUI folder: it has no models folder; name the one that holds main.py and models")
    return folder / "models"


def _is_present(target: Path, size: int, sha256: str | None) -> bool:
    """Whether the whole file is there; TimError for another file under its name."""
    if not target.exists():
        return False
    if not target.is_file() or target.stat().st_size != size or (sha256 is not None and sha256_of(target) != sha256):
        raise TimError(f"{target}: another file has this name; move or delete it, then repeat the command")
    return True


def _check_space(downloads: list[Download]) -> None:
    needed: dict[int, tuple[Path, int]] = {}
    for download in downloads:
        if download.present:
            continue
        there = next(folder for folder in download.target.absolute().parents if folder.exists())
        fetched = download.partial.stat().st_size if download.partial.exists() else 0
        device = there.stat().st_dev
        needed[device] = (there, needed.get(device, (there, 0))[1] + max(0, download.size - fetched))
    for there, size in needed.values():
        if (free := shutil.disk_usage(there).free) < size:
            raise TimError(f"{there}: {_gigabytes(size)} needed, {_gigabytes(free)} free; free some space or choose another folder")


def _fetch_one(download: Download) -> None:
    from filelock import FileLock, Timeout

    make_folder(download.target.parent)
    partial = download.partial
    lock = FileLock(partial.with_suffix(".lock"), timeout=0)
    deleted = "so the file was deleted; repeat the command"
    try:
        with lock:
            _resume(download, partial)
            if (size := partial.stat().st_size) != download.size:
                partial.unlink()
                raise TimError(f"{download.name}: got {size} bytes instead of {download.size}, {deleted}")
            if download.sha256 is not None and (sha256 := sha256_of(partial)) != download.sha256:
                partial.unlink()
                raise TimError(f"{download.name}: got sha256 {sha256} instead of {download.sha256}, {deleted}")
            os.replace(partial, download.target)
    except Timeout:
        raise TimError(f"{download.target}: another download of this file is running; wait for it") from None
    Path(lock.lock_file).unlink(missing_ok=True)


def _resume(download: Download, partial: Path) -> None:
    """Appends what is missing to the partial file."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    with _explained(download.repository, download.asset), open(partial, "ab") as opened:
        if (fetched := opened.tell()) < download.size:
            url = hf_hub_url(download.repository, download.asset.name, endpoint=_endpoint())
            http_get(url, opened, resume_size=fetched, headers=build_hf_headers(), expected_size=download.size)


class _explained:
    """Turns the errors of huggingface_hub, the network and the disk into one line that says what to do."""

    def __init__(self, repository: str, asset: Asset, interrupted: str = "the download was interrupted"):
        self.name, self.source, self.interrupted = f"{repository}/{asset.name}", asset.source, interrupted

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None or isinstance(error, TimError) or not isinstance(error, Exception):
            return False
        raise TimError(f"{self.name}: {self._reason(error)}") from error

    def _reason(self, error: Exception) -> str:
        from huggingface_hub import errors

        status = getattr(getattr(error, "response", None), "status_code", None)
        cause = error.__cause__ or error
        if isinstance(error, errors.GatedRepoError) or (status in (401, 403) and self.source.gated):
            return (f"access refused ({status}): accept the terms on huggingface.co/{self.source.repository} and run `hf auth login`, or "
                    f"add --mirror to take {self.source.mirror}")
        if status == 401:
            return "not found, or private (401): check HF_ENDPOINT and HF_TOKEN"
        if status == 403:
            return "access refused (403): check HF_TOKEN"
        if status == 404 or isinstance(error, (errors.EntryNotFoundError, errors.RepositoryNotFoundError)) and status is not None:
            return f"not found ({status}): the repository may have moved; see docs/released-weights.md"
        if isinstance(error, errors.OfflineModeIsEnabled) or isinstance(cause, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set; unset it to download"
        if isinstance(error, OSError) and error.errno is not None and status is None and not isinstance(error, ConnectionError):
            return f"{one_line(error)}; check the disk, then repeat the command to resume"
        if status is not None:
            return f"the server answered {status}; repeat the command to resume"
        return f"{self.interrupted} ({one_line(error)}); check the network, then repeat the command to resume"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
