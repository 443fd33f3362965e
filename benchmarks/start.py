"""What the pack adds to ComfyUI's start: seconds of the processor, and modules that ComfyUI had not loaded itself.

    <ComfyUI's python> benchmarks/start.py PATH_TO_COMFYUI

Run it twice: the first run compiles our files to bytecode.
"""

import asyncio
import os
import sys
import time
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent


def main() -> None:
    comfyui = Path(sys.argv[1]).resolve()
    os.chdir(comfyui)
    sys.path.insert(0, str(comfyui))
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import utils.install_util  # noqa: F401, I001 (before nodes, which would hide it)
    import nodes
    import server  # noqa: F401

    asyncio.run(nodes.init_builtin_extra_nodes())
    before, began, spent = set(sys.modules), time.perf_counter(), time.process_time()
    loaded = asyncio.run(nodes.load_custom_node(str(PACK)))
    wall, cpu = time.perf_counter() - began, time.process_time() - spent
    own = str(PACK).replace(".", "_x_")
    core = ("tomllib",)  # with which ComfyUI reads our pyproject.toml
    new = sorted(name for name in set(sys.modules) - before if not name.startswith((own, *core)))
    print(f"loaded: {loaded}")
    print(f"{wall:.3f} s, {cpu:.3f} s of the processor")
    print("new modules:", ", ".join(new) or "none but our own")
    print("our own:", ", ".join(sorted(name.removeprefix(own + ".") for name in sys.modules if name.startswith(own + "."))))


if __name__ == "__main__":
    main()
