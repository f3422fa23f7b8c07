import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
SMOLLM2 = ROOT / "data" / "smollm2"
sys.path.insert(0, str(ROOT))

from model import Llama, Template               # noqa: E402
from mrm import load_adapter, load_released_mrm     # noqa: E402


@pytest.fixture(scope="session")
def golden_search():
    """The search of the paper's authors, run on the two tiny models: prompts, frontiers, outputs."""
    return json.loads((GOLDEN / "search.json").read_text())


@pytest.fixture(scope="session")
def tiny_policy(golden_search):
    llama = Llama.load(GOLDEN / "tiny_policy", torch.float64)
    llama.template = Template(golden_search["policy_prefix"], golden_search["policy_infix"])
    return llama


@pytest.fixture(scope="session")
def tiny_guard():
    return Llama.load(GOLDEN / "tiny_guard", torch.float64)


@pytest.fixture(scope="session")
def tiny_mrm(tiny_guard, golden_search):
    template = Template(golden_search["mrm_prefix"], golden_search["mrm_infix"])
    return load_released_mrm(GOLDEN / "tiny_mrm", tiny_guard, template)


@pytest.fixture(scope="session")
def smollm2_folder():
    """The default weights, made on the first run and kept."""
    if not (SMOLLM2 / "model.safetensors").exists():
        subprocess.run([sys.executable, SMOLLM2 / "prepare.py"], check=True)
    return SMOLLM2


@pytest.fixture(scope="session")
def smollm2(smollm2_folder):
    return Llama.load(smollm2_folder)


@pytest.fixture(scope="session")
def guard(smollm2):
    return load_adapter(SMOLLM2 / "guard.safetensors", smollm2, "guard")


@pytest.fixture(scope="session")
def mrm(smollm2):
    return load_adapter(SMOLLM2 / "mrm.safetensors", smollm2, "mrm")


@pytest.fixture(scope="session")
def public_data():
    """The folder with the publishers' data sets, named by SAFFRON_DATA."""
    folder = os.environ.get("SAFFRON_DATA")
    if not folder:
        pytest.skip("SAFFRON_DATA does not name a folder with the public data sets")
    return Path(folder)


def run_script(*args, stdin=""):
    """Run one of the repository's scripts as a user would: (exit status, stdout, stderr)."""
    done = subprocess.run([sys.executable, *map(str, args)], input=stdin, capture_output=True, text=True, cwd=ROOT,
                          encoding="utf-8", timeout=300)
    return done.returncode, done.stdout, done.stderr
