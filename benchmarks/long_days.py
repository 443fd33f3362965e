"""Long days of one ComfyUI: many mixed prompts while a second client cancels at random, then several programs over the same files.

    python benchmarks/long_days.py [--prompts 500] [--seed 0] [--json FILE]

1. A server makes a reference of every kind of prompt, one after the other.
2. Another server takes the prompts in random order, each kind among the first 50, while a second client deletes queued ones and
   interrupts running ones. Counts lost prompts and images that differ from their reference; follows resident memory and open files.
3. Both servers and `tim sample` use the same model file at once. Then that file is replaced under a running server.

Prints one line per check and exits with 1 if one fails. COMFYUI_PATH and COMFYUI_PYTHON say which ComfyUI, as in the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.comfy_graph import BUNDLED_NAME, Graph  # noqa: E402
from tests.comfy_support import Server, find  # noqa: E402
from tim_core.files import atomic_write  # noqa: E402
from tim_core.weights.parts import BUNDLED  # noqa: E402

FILE_NAME = "shared.safetensors"
PROMPTS = ("a red circle", "two blue squares", "a green triangle left of a white circle", "a yellow square above a purple triangle")
SIZES = ((64, 64), (48, 96), (96, 48), (128, 128))
KINDS = ("tim", "euler", "heun", "custom", "split", "upscale", "sweep", "image to image", "shared file")
WARM_UP = 50  # prompts after which memory must not grow
QUEUE = 6  # prompts that wait at a time
GROWTH = 0.02


def build(kind: str, prompt: str, size: tuple[int, int], seed: int) -> tuple[dict, str]:
    """A prompt in API format, and the node that saves its images."""
    graph = Graph(FILE_NAME if kind == "shared file" else BUNDLED_NAME)
    text, empty = graph.text(prompt), graph.empty(*size)
    links = dict(model=graph.model, vae=graph.vae, positive=text, negative=graph.text(""))
    if kind in ("tim", "shared file"):
        latent = graph.tim(empty, text, seed=seed)
    elif kind == "euler":
        latent = graph.stock(empty, text, seed=seed)
    elif kind == "heun":
        latent = graph.stock(empty, text, seed=seed, steps=30, cfg=1.0, sampler_name="heun")
    elif kind == "custom":
        latent = graph.guided(graph.add("CFGGuider", model=graph.model, positive=text, negative=links["negative"], cfg=2.5), steps=4)
    elif kind == "split":
        latent = graph.tim(graph.tim(empty, text, seed=seed, steps=2, end=0.5), text, seed=seed, steps=2, start=0.5, add_noise=False)
    elif kind == "image to image":
        first = graph.add("VAEDecode", samples=graph.tim(empty, text, seed=seed, steps=2), vae=graph.vae)
        latent = graph.stock(graph.add("VAEEncode", pixels=first, vae=graph.vae), text, seed=seed, denoise=0.5)
    elif kind == "sweep":
        shared = dict(seed=seed, steps="1, 2, 4", cfg=2.5, guidance_low=0.0, guidance_high=1.0)
        images = graph.add("TiMStepSweep", **links, latent_image=empty, **shared)[0], 1  # the sheet shows seconds
        return graph.prompt, graph.add("SaveImage", images=list(images), filename_prefix="long")[0]
    else:
        assert kind == "upscale", kind
        first = graph.add("VAEDecode", samples=graph.tim(empty, text, seed=seed), vae=graph.vae)
        image = graph.add("ImageScaleBy", image=first, upscale_method="lanczos", scale_by=2.0)
        latent = graph.stock(graph.add("VAEEncode", pixels=image, vae=graph.vae), text, seed=seed, denoise=0.3)
    return graph.prompt, graph.picture(latent)


def pool(chooser: random.Random) -> list[tuple]:
    """Every kind with every size, with a text and a seed of its own."""
    return [(kind, chooser.choice(PROMPTS), size, chooser.randrange(2**32)) for kind in KINDS for size in SIZES]


def pixels(server: Server, entry: dict, node: str) -> bytes:
    """The pixels of a finished prompt's images."""
    return b"".join(Image.open(server.file(image)).tobytes() for image in entry["outputs"][node]["images"])


def run(server: Server, request: tuple) -> bytes:
    prompt, node = build(*request)
    entry = server.wait(server.queue(prompt))
    assert entry["status"]["status_str"] == "success", entry["status"]
    return pixels(server, entry, node)


def resident(process: int) -> int:
    """Bytes of anonymous memory that a process holds: files that it maps come and go with the system's cache."""
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def handles(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


def _difference(made: bytes, reference: bytes) -> str:
    if len(made) != len(reference):
        return f"{len(made)} bytes in place of {len(reference)}"
    apart = [abs(a - b) for a, b in zip(made, reference)]
    return f"{sum(map(bool, apart))} of {len(apart)} values differ, by up to {max(apart)}"


class Canceller(threading.Thread):
    """A second client: at random times it deletes a queued prompt or interrupts the running one."""

    def __init__(self, server: Server, seed: int, pause: float):
        super().__init__(daemon=True)
        self.server, self.chooser, self.pause = server, random.Random(seed), pause
        self.deleted, self.interrupts, self.over = set(), 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(self.chooser.uniform(0.2, 1.8) * self.pause):
            queue = self.server.get("queue")
            if self.chooser.random() < 0.5 and queue["queue_pending"]:
                chosen = self.chooser.choice(queue["queue_pending"])[1]
                self.server.read("queue", {"delete": [chosen]})
                self.deleted.add(chosen)
            elif queue["queue_running"]:
                self.server.read("interrupt", {})
                self.interrupts += 1


def long_day(server: Server, requests: list[tuple], references: dict, count: int, seed: int) -> dict:
    """Run `count` prompts beside the second client -> what was counted."""
    chooser = random.Random(seed)
    canceller = Canceller(server, seed, pause=3.0)
    canceller.start()
    waiting: dict[str, tuple] = {}
    first = chooser.sample(requests, len(requests))  # memory has its peak once every kind and size has run
    result = {"finished": 0, "wrong": [], "interrupted": 0, "deleted": 0, "failed": [], "memory": [], "handles": []}
    bar, queued = tqdm(total=count, unit="prompt"), 0
    while queued < count or waiting:
        while queued < count and len(waiting) < QUEUE:
            request = first.pop() if first else chooser.choice(requests)
            prompt, node = build(*request)
            waiting[server.queue(prompt)] = (request, node)
            queued += 1
        time.sleep(0.05)
        alive = {item[1] for part in server.get("queue").values() for item in part}
        for prompt_id in [*waiting]:
            entry = server.get(f"history/{prompt_id}").get(prompt_id)
            if not (entry and entry.get("status")):
                if prompt_id in canceller.deleted and prompt_id not in alive:
                    result["deleted"] += 1
                elif prompt_id in alive or server.get(f"history/{prompt_id}") or prompt_id in canceller.deleted:
                    continue
                else:
                    result["failed"].append(f"{prompt_id} is neither queued nor in the history")
            else:
                request, node = waiting[prompt_id]
                kinds = [kind for kind, _ in entry["status"]["messages"]]
                if entry["status"]["status_str"] == "success":
                    result["finished"] += 1
                    made = pixels(server, entry, node)
                    if made != references[request]:
                        result["wrong"].append(f"{request}: {_difference(made, references[request])}")
                elif "execution_interrupted" in kinds:
                    result["interrupted"] += 1
                else:
                    result["failed"].append(f"{request[0]}: {entry['status']['messages'][-1]}")
            del waiting[prompt_id]
            bar.update()
            result["memory"].append(resident(server.process.pid))
            result["handles"].append(handles(server.process.pid))
    canceller.over.set()
    canceller.join()
    result["interrupts"] = canceller.interrupts
    return result


def together(servers: list[Server], requests: list[tuple], references: dict, file: Path, folder: Path) -> dict:
    """Both servers and `tim sample`, at once, over one file -> counts of images and of those that differ from their reference."""
    counts = {"images": 0, "wrong": 0, "tim": 0, "tim_wrong": 0}
    lock = threading.Lock()

    def serve(server: Server) -> None:
        for request in requests:
            wrong = run(server, request) != references[request]
            with lock:
                counts["images"] += 1
                counts["wrong"] += wrong

    threads = [threading.Thread(target=serve, args=(server,)) for server in servers]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or not counts["tim"]:
        request = requests[counts["tim"] % len(requests)]
        _, prompt, (width, height), seed = request
        out = folder / "tim.png"
        command = [sys.executable, "-m", "tim_core", "sample", prompt, "--model", file, "--size", f"{width}x{height}", "--steps", "4"]
        command += ["--cfg", "2.5", "--seed", str(seed), "-o", out]
        subprocess.run([str(word) for word in command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        made = torch.frombuffer(bytearray(Image.open(out).tobytes()), dtype=torch.uint8).int()
        reference = torch.frombuffer(bytearray(references[request]), dtype=torch.uint8).int()
        counts["tim"] += 1
        counts["tim_wrong"] += int((made - reference).abs().max()) > 2
    for thread in threads:
        thread.join()
    return counts


def write_model(path: Path, scale: float) -> None:
    """The bundled model with its last layer scaled, in place of what is there."""
    with safe_open(BUNDLED["tim-shapes"], "pt") as file:
        metadata = file.metadata()
    tensors = load_file(BUNDLED["tim-shapes"])
    tensors["model.diffusion_model.final_layer.linear.weight"] *= scale
    atomic_write(path, lambda tmp: save_file(tensors, tmp, metadata))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=500, help="prompts of the long day (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of prompts and of what is cancelled (default: 0)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to FILE")
    args = parser.parse_args()
    if (found := find()) is None:
        parser.error("no ComfyUI found; set COMFYUI_PATH")
    requests = pool(random.Random(args.seed))
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = []
        for name in ("reference", "long"):
            servers.append(Server(folder / name, *found))
            stack.callback(servers[-1].stop)
        shared = folder / FILE_NAME
        write_model(shared, 1.0)
        for server in servers:
            (server.base / "models" / "checkpoints" / FILE_NAME).symlink_to(shared)
        references = {request: run(servers[0], request) for request in tqdm(requests, unit="reference")}
        day = long_day(servers[1], requests, references, args.prompts, args.seed)
        both = together(servers, [request for request in requests if request[0] == "shared file"], references, shared, folder)
        request = next(request for request in requests if request[0] == "shared file")
        write_model(shared, 0.5)
        replaced = run(servers[1], request)
        write_model(shared, 1.0)
        restored = run(servers[1], request)
    first, last = (statistics.median(part) for part in (day["memory"][WARM_UP : 2 * WARM_UP], day["memory"][-WARM_UP:]))
    growth = last / first - 1
    grown = statistics.median(day["handles"][-WARM_UP:]) - statistics.median(day["handles"][WARM_UP : 2 * WARM_UP])
    ended = day["finished"] + day["interrupted"] + day["deleted"]
    checks = {
        f"{ended} of {args.prompts} prompts accounted for: {day['finished']} finished, {day['deleted']} deleted, "
        f"{day['interrupted']} interrupted by {day['interrupts']} requests": ended == args.prompts and not day["failed"]
        and day["interrupted"] <= day["interrupts"],
        f"{len(day['wrong'])} of {day['finished']} finished prompts differ from their reference": day["finished"] > 0 and not day["wrong"],
        f"memory grew by {100 * growth:.2f} % after the first {WARM_UP} ({first / 2**20:.0f} to {last / 2**20:.0f} MiB)": growth < GROWTH,
        f"open files grew by {grown:g}": grown <= 0,
        f"two servers at once: {both['wrong']} of {both['images']} images wrong; tim beside them: {both['tim_wrong']} of {both['tim']}":
            both["wrong"] == both["tim_wrong"] == 0,
        "a replaced file is picked up, and so is the old one put back": replaced != references[request] and restored == references[request],
    }
    for text, right in checks.items():
        print(("ok    " if right else "WRONG ") + text)
    for line in day["failed"] + day["wrong"]:
        print(f"      {line}")
    print(f"{time.monotonic() - started:.0f} s")
    if args.json:
        curve = [statistics.median(day["memory"][i : i + WARM_UP]) for i in range(0, len(day["memory"]), WARM_UP)]
        report = {"prompts": args.prompts, "seed": args.seed, "growth": growth, "handles_grown": grown, "memory_per_50": curve, **both,
                  **{name: value for name, value in day.items() if name not in ("memory", "handles")}, "checks": checks}
        atomic_write(Path(args.json), lambda tmp: tmp.write_text(json.dumps(report, indent=1) + "\n"))
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
