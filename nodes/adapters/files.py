"""Lists the files of ComfyUI's models folders, bundled models first, and opens one of them."""

import os
from dataclasses import replace
from pathlib import Path

import folder_paths

from ...tim_core.errors import TimError, escaped
from ...tim_core.weights.parts import BUNDLED
from ...tim_core.weights.read import read_parts

BUNDLED_NAMES = {f"{name} (bundled)": name for name in BUNDLED}


def list_files(folder: str) -> list[str]:
    """Names of the bundled models, then of the files in a models folder."""
    return [*BUNDLED_NAMES, *map(portable, folder_paths.get_filename_list(folder))]


def portable(name: str, separator: str = os.sep) -> str:
    """A name in a subfolder with / on every system, so that a workflow saved on one opens on another. Windows opens it, too."""
    return name.replace(separator, "/")


def list_folders(folder: str) -> list[str]:
    """Names, ending in /, of the folders in Hugging Face layout (weights with config.json) inside a models folder."""
    found = set()
    for root in map(Path, folder_paths.get_folder_paths(folder)):
        for config in root.glob("*/config.json"):
            if any(config.parent.glob("*.safetensors")) or any(config.parent.glob("*.bin")):
                found.add(f"{config.parent.name}/")
    return sorted(found)


def find_source(folder: str, name: str) -> str | None:
    """What a listed name stands for: a bundled name, or the path of a file or folder. None if it is not there."""
    if name.endswith("/"):
        places = [Path(root) / name for root in folder_paths.get_folder_paths(folder)]
        return next((str(place) for place in places if place.is_dir()), None)
    return BUNDLED_NAMES.get(name) or folder_paths.get_full_path(folder, name)


def fingerprint(folder: str, name: str | None) -> list[tuple]:
    """Changes when the file behind a listed name, or one in the folder behind it, is replaced: a loader then runs again."""
    if name is None or (source := find_source(folder, name)) is None:
        return []
    path = Path(BUNDLED.get(source, source))
    try:
        stats = [(str(file), file.stat()) for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    except OSError:  # being replaced at this moment; loading it says more
        return []
    return [(file, stat.st_mtime_ns, stat.st_size, stat.st_ino) for file, stat in stats]


def open_parts(folder: str, name: str, *wanted: str):
    """Opens a listed file or folder. TimError naming it if it is not there or lacks one of the `wanted` parts.

    Errors name files as the lists do, from the models folder on: users share them, and the rest of a path is private.
    """
    if (source := find_source(folder, name)) is None:
        raise TimError(f"{name}: not found in models/{folder}; choose a listed file or {', '.join(BUNDLED_NAMES)}")
    root = f"{Path(BUNDLED.get(source, source)).parents[len(Path(name).parts) - 1]}{os.sep}"
    try:
        parts = read_parts(str(Path(source)))
    except TimError as error:
        raise TimError(str(error).replace(escaped(root), "")) from None
    parts.source = parts.source.replace(root, "")
    parts.parts = {kind: replace(part, source=part.source.replace(root, "")) for kind, part in parts.parts.items()}
    parts.require(*wanted)
    return parts
