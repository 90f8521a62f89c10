"""The Python of docs/reproduce.md, and its script, on a tiny model and generated rows in place of downloads."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from mogeo.demo.world import OBJECTIVES, World, tiny_model, tokenizer

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reproduce.md"

SMALL = {
    "openbmb/UltraFeedback": "rows.jsonl",
    "Qwen/Qwen2.5-0.5B-Instruct": "tiny",
    "runs/qwen-cdpo/model": "tiny",  # what the command between the blocks would have made
    ", 1000,": ", 10,",
    'model.to("cuda")': "pass",
    "max_new_tokens=512": "max_new_tokens=8",
    "num_train_epochs=1": "max_steps=1, use_cpu=True, bf16=False, report_to=[]",
    "max_length=1024)": "max_length=64, max_steps=2)",
}


@pytest.mark.slow
def test_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words: Any = tokenizer()
    words.add_tokens([f"<{name}:{rating}>" for name in OBJECTIVES for rating in range(1, 6)])
    words.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    words.save_pretrained("tiny")
    tiny_model(words).save_pretrained("tiny")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in World(0).rows(40)))
    script = next(b for b in re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL) if "alignment cdpo" in b)
    python, path, *options = shlex.split(script.replace("\\\n", " ").replace("openbmb/UltraFeedback", "rows.jsonl"))
    assert python == "python"
    options[options.index("--held-out") + 1] = "10"
    subprocess.run([sys.executable, str(ROOT / path), *options], check=True)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    for real, small in SMALL.items():
        assert real in code, real
        code = code.replace(real, small)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's, and those of what it imports
        exec(compile(code, str(PAGE), "exec"), {})
    said = [json.loads(line) for line in Path("cdpo-said.jsonl").read_text().splitlines()]
    assert len(said) == 10
    assert Path("runs/qwen-modpo/model/config.json").exists()
    assert Path("runs/cpsft/model.safetensors").exists()
    rows = map(json.loads, Path("cdpo/preferences.jsonl").read_text().splitlines())
    assert all(row["instruction"].count("<") == 4 for row in rows)
