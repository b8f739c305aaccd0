"""The head's Triton kernel: its numbers by Triton's interpreter (on a GPU compiled), and whether it compiles.

Whether a kernel is interpreted is settled when triton is first imported, so each has a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (torch for CUDA brings it)")


def call(*words, **environment):
    settings = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *words], env=settings, capture_output=True, text=True, timeout=400)


def test_its_numbers_are_those_of_torch():
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    cases = Path(__file__).with_name("head_triton_cases.py")
    done = call("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases), **interpreted)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 40 and "skipped" not in done.stdout


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from convexlm.head_triton import _row_kernel, _scale_kernel

pointers = {"labels_ptr": "*i64", "correct_ptr": "*i8"}
types = {name: "*fp32" for name in _row_kernel.arg_names if name.endswith("_ptr")} | {"chunk_ptr": "*bf16"} | pointers
types |= {"stride": "i64", "vocabulary": "i32", "scale": "fp32", "cap": "fp32"}
flags = {name: True for name in _row_kernel.arg_names if name.isupper()} | {"BLOCK": 1024}
source = ASTSource(_row_kernel, types | dict.fromkeys(flags, "constexpr"), flags)
types = {"x_ptr": "*bf16", "factor_ptr": "*fp32", "count": "i32", "BLOCK": "constexpr"}
scaling = ASTSource(_scale_kernel, types, {"BLOCK": 4096})
for each in (source, scaling):
    print(len(triton.compile(each, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""


def test_it_compiles_for_a_gpu_that_is_not_here():
    # The interpreter takes what the compiler refuses, so the compiler is asked as well.
    done = call("-c", COMPILE)
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = [int(line) for line in done.stdout.split()]
    assert len(sizes) == 2 and min(sizes) > 1000
