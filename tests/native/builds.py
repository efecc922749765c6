"""The native library with a sanitizer in it and tests/native/driver.c, as one program by the system's compiler."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "native"
# Without passes of GCC that take a quarter of the time of compiling checks, and make what is checked no faster.
_HASTE = ["-fno-dse", "-fno-tree-dominator-opts", "-fno-tree-fre", "-fno-tree-pta", "-fno-forward-propagate"]


def compiler() -> str | None:
    """The system's C compiler, or $CC."""
    return shutil.which(os.environ.get("CC") or "cc")


def missing(sanitizer: str, folder: Path) -> str:
    """Why programs with the sanitizer cannot be made and run here, or ""."""
    cc = compiler()
    if cc is None:
        return "no C compiler"
    source, program = folder / f"{sanitizer}.c", folder / sanitizer
    source.write_text("int main(void) { return 0; }\n")
    for command in ([cc, f"-fsanitize={sanitizer}", str(source), "-o", str(program)], [str(program)]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            return f"{' '.join(command)}: {done.stderr.strip()[-500:]}"
    return ""


def build(sanitizer: str, isas: list[str], folder: Path, driver_flags: tuple[str, ...] = ()) -> Path:
    """The driver with the library's sources, all under one sanitizer; as many compilers at once as there are cores.

    What lies in `folder` already is not compiled again, but for the driver.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cc = compiler()
    assert cc is not None
    flags = f"-std=c11 -O1 -g1 -D_POSIX_C_SOURCE=200809L -I{NATIVE}/include -fsanitize={sanitizer}".split()
    flags += ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer", *_shared_flags(), *_haste(cc)]
    if platform.machine().lower() in ("x86_64", "amd64") and {"avx2", "avx512"} <= set(isas):
        flags.append("-DESP_BUILD_X86")
    jobs = {
        folder / f"{isa}_{source.stem}.o": [*isa_flags(isa), f"-DESP_ISA={isa}", str(source)]
        for source in sorted((NATIVE / "kernels").glob("*.c"))
        for isa in isas
    }
    jobs |= {folder / f"{source.stem}.o": [str(source)] for source in sorted((NATIVE / "src").glob("*.c"))}
    objects = list(map(str, jobs))
    todo = [[cc, *flags, *job, "-c", "-o", str(path)] for path, job in jobs.items() if not path.exists()]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_do, todo))
    program = folder / "-".join(["program", *driver_flags])
    driver = str(Path(__file__).parent / "driver.c")
    _do([cc, *flags, *driver_flags, driver, *objects, "-o", str(program), "-lm", "-lpthread"])
    return program


def isa_flags(isa: str) -> list[str]:
    """As CMakeLists.txt has them."""
    found = re.search(rf"set\(espalier_flags_{isa}\b([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert found, f"CMakeLists.txt has no flags for {isa}"
    return found[1].split()


def _shared_flags() -> list[str]:
    """Those of CMakeLists.txt that change what is computed."""
    found = re.search(r"set\(espalier_flags ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert found
    return [flag for flag in found[1].split() if flag.startswith("-f")]


def _haste(cc: str) -> list[str]:
    """_HASTE, where the compiler knows it."""
    done = subprocess.run([cc, *_HASTE, "-E", "-x", "c", os.devnull], capture_output=True, timeout=60, check=False)
    return [] if done.returncode else _HASTE


def _do(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-3000:]}"
