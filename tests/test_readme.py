"""What README.md says is true of the tree: its commands and snippets run, here at a reduced size."""
import importlib
import json
import re
import shlex
import sys
import types
from pathlib import Path

import pytest

import model
import sample
import train
from data import prepare

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BOOK = (ROOT / "tests/results/README.md").read_text()
NOT_RUN = {"pip install": "installs from the network; .ci/run runs this line",
           "python -m pytest": "runs this test",
           "torchrun": "several processes; test_ranks.py and .ci/run start smaller runs",
           "--out_dir out-fsdp": "resumes what torchrun trained; so does test_ranks.py",
           "moonshotai/": "downloads 32 GB"}
FEW_STEPS = "--max_iters 2 --eval_interval 2 --batch_size 2 --block_size 32".split()
SMALL = "--hidden_size 32 --num_hidden_layers 2 --moe_intermediate_size 16 --intermediate_size 32".split()


def fences(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def reduced(words):
    """The arguments of a train.py command, with a run of two steps (four, where it names its steps)."""
    if "--max_iters" in words:
        words[words.index("--max_iters") + 1] = "4"
    if "--resume" in words:
        return words
    return words + FEW_STEPS + ([] if "--init_from" in words else SMALL)


def run(command, monkeypatch):
    python, script, *words = shlex.split(command, comments=True)
    assert python == "python", command
    if script == "-c":
        exec(words[0], {})
    elif script == "train.py":
        train.main(reduced(words))
    elif script == "sample.py":
        sample.main(words + ["--max_new_tokens", "4"])
    else:
        assert script == "data/prepare.py", command
        monkeypatch.setattr(sys, "argv", [script, *words])
        prepare.main()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of a reader who has a text, pairs of prompts and completions, and a released model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(README)
    pairs = [{"prompt": f"What is {i} + 1? ", "completion": str(i + 1)} for i in range(200)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return tmp_path


def test_commands_run(folder, monkeypatch):
    for command in "".join(fences("sh")).replace("\\\n", " ").splitlines():
        if any(part in command for part in NOT_RUN):
            continue
        if "MODEL_DIR" in command and not (folder / "MODEL_DIR").exists():
            book = sample.load("out-book", "cpu")
            book.model.save_pretrained("MODEL_DIR", book.encoding)
        run(command, monkeypatch)
    assert (folder / "export/model.safetensors").exists()


def test_what_is_not_run_is_still_there():
    for part in NOT_RUN:
        assert part in README, f"README.md no longer has a command with {part}: take it out of NOT_RUN"


def test_snippets_run(folder, monkeypatch):
    prepare.prepare(folder / "data/book", input=folder / "book.txt")
    main = train.main
    monkeypatch.setattr(train, "main", lambda argv, **options: main(
        reduced(argv + ["--data_dir", "data/book"]), **options))
    logged = []
    wandb = types.SimpleNamespace(init=lambda **_: None, log=logged.append)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for code in fences("python"):
        with monkeypatch.context() as patch:
            for name in ("MLA", "MLP", "Gate", "MoE", "Block"):      # put back what a snippet replaces
                patch.setattr(model, name, getattr(model, name))
            exec(code, {})
    assert logged and "loss" in logged[-1]


def test_names_in_the_table_of_the_report_exist():
    modules = [importlib.import_module(name) for name in ("model", "optim", "sample")]
    table = README[README.index("| report |"):README.index("## Use")].strip()
    names = [name for row in table.splitlines()[2:]
             for name in re.findall(r"`([A-Za-z_0-9]+(?:\.[a-z_]+)?)`", row.split("|")[-2])
             if not name.endswith(".py")]
    assert len(names) > 15
    for name in names:
        owner, _, attribute = name.partition(".")
        found = [getattr(module, owner) for module in modules if hasattr(module, owner)]
        assert found, f"README.md names {name}, which is in none of model.py, optim.py and sample.py"
        assert not attribute or hasattr(found[0], attribute), name


def test_line_counts_are_those_of_the_files():
    row = r"^\| (\[`[a-z0-9_]+(?:\.py|/)`\].*?) \| .* \| ([\d,]+(?:, [\d,]+)*) \|$"
    rows = re.findall(row, README, re.MULTILINE)
    counts = {}
    for files, lines in rows:
        names = re.findall(r"`([a-z0-9_]+(?:\.py|/))`", files)
        counts |= dict(zip(names, map(int, lines.split(", ")), strict=True))
    files = {"model.py", "train.py", "optim.py", "sample.py", "checkpoint.py", "fp8.py", "data/"}
    assert files == set(counts)
    for name, claimed in counts.items():
        files = [ROOT / name] if name.endswith(".py") else (ROOT / name).glob("*.py")
        lines = sum(len(path.read_text().splitlines()) for path in files)
        assert abs(lines - claimed) <= 0.05 * lines, f"{name} has {lines} lines; README.md says {claimed}"


def test_links_lead_somewhere():
    for text, folder in (README, ROOT), (BOOK, ROOT / "tests/results"):
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if link.startswith("http"):
                continue
            path, _, anchor = link.partition("#")
            assert (folder / path).exists(), link
            if anchor:
                target = (folder / path).read_text() if path else text
                headings = re.findall(r"^#+ (.*)$", target, re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, link


def test_readme_stays_a_page():
    assert len(README.splitlines()) <= 220 and len(README.split()) <= 2300
