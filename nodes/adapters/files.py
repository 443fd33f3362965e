"""What ComfyUI's models folders hold, the bundled models first, and opening one of them."""

from pathlib import Path

import folder_paths

from ...tim_core.errors import TimError
from ...tim_core.weights.parts import BUNDLED, read_parts

BUNDLED_NAMES = {f"{name} (bundled)": name for name in BUNDLED}


def list_files(folder: str) -> list[str]:
    """The bundled models first, then what ComfyUI lists of a models folder."""
    return [*BUNDLED_NAMES, *folder_paths.get_filename_list(folder)]


def list_folders(folder: str) -> list[str]:
    """Folders in Hugging Face layout (weights and their config.json) inside a models folder, by relative name with a / behind."""
    found = set()
    for root in map(Path, folder_paths.get_folder_paths(folder)):
        for config in root.glob("*/config.json"):
            if any(config.parent.glob("*.safetensors")) or any(config.parent.glob("*.bin")):
                found.add(f"{config.parent.name}/")
    return sorted(found)


def open_parts(folder: str, name: str, *wanted: str):
    """The parts of a listed file or folder; TimError naming it unless all `wanted` ones are in it."""
    if name.endswith("/"):
        places = [Path(root) / name for root in folder_paths.get_folder_paths(folder)]
        source = next((str(place) for place in places if place.is_dir()), None)
    else:
        source = BUNDLED_NAMES.get(name) or folder_paths.get_full_path(folder, name)
    if source is None:
        raise TimError(f"{name}: found no such file, expected one in models/{folder} or {', '.join(BUNDLED_NAMES)}")
    parts = read_parts(source)
    parts.require(*wanted)
    return parts
