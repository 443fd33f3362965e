"""Lists the files of ComfyUI's models folders, bundled models first, and opens one of them."""

from pathlib import Path

import folder_paths

from ...tim_core.errors import TimError
from ...tim_core.weights.parts import BUNDLED, read_parts

BUNDLED_NAMES = {f"{name} (bundled)": name for name in BUNDLED}


def list_files(folder: str) -> list[str]:
    """Names of the bundled models, then of the files in a models folder."""
    return [*BUNDLED_NAMES, *folder_paths.get_filename_list(folder)]


def list_folders(folder: str) -> list[str]:
    """Names, ending in /, of the folders in Hugging Face layout (weights with config.json) inside a models folder."""
    found = set()
    for root in map(Path, folder_paths.get_folder_paths(folder)):
        for config in root.glob("*/config.json"):
            if any(config.parent.glob("*.safetensors")) or any(config.parent.glob("*.bin")):
                found.add(f"{config.parent.name}/")
    return sorted(found)


def open_parts(folder: str, name: str, *wanted: str):
    """Opens a listed file or folder. TimError naming it if it is not there or lacks one of the `wanted` parts."""
    if name.endswith("/"):
        places = [Path(root) / name for root in folder_paths.get_folder_paths(folder)]
        source = next((str(place) for place in places if place.is_dir()), None)
    else:
        source = BUNDLED_NAMES.get(name) or folder_paths.get_full_path(folder, name)
    if source is None:
        raise TimError(f"{name}: not found in models/{folder}; choose a listed file or {', '.join(BUNDLED_NAMES)}")
    parts = read_parts(source)
    parts.require(*wanted)
    return parts
