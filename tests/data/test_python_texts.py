"""Text that every Python brings."""

from __future__ import annotations

import importlib.util
import platform
import sys
from pathlib import Path

from genscale.data.plans import plan_differences
from genscale.data.python_texts import standard_library
from genscale.data.text.data import TextData, TextDataSettings


def test_the_standard_library_is_that_of_this_python():
    texts = set(standard_library())
    specs = [importlib.util.find_spec(name) for name in sorted(sys.stdlib_module_names - {"this", "antigravity"})
             if not name.startswith(("_sysconfigdata", "encodings", "pydoc_data"))]
    files = [Path(spec.origin) for spec in specs if spec and (spec.origin or "").endswith(".py")]
    assert len(files) > 150
    assert not [file for file in files if (text := file.read_text()) and text not in texts and "site-packages" not in str(file)]
    assert not any("import unittest.test" in text or "installed by pip" in text for text in texts)
    assert 8e6 < sum(map(len, texts)) < 20e6
    assert standard_library() == standard_library()


def test_its_plan_names_the_python_whose_text_it_is(monkeypatch):
    settings = TextDataSettings(source="python-stdlib", validation_blocks=2)
    data = TextData(settings, seed=1)
    plan = data.plan()
    assert plan["source_python"] == platform.python_version()
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.1")  # the text of another one cannot be had here
    assert plan_differences(plan, data.plan()) == ["source_python"]
    assert "source_python" not in TextData(TextDataSettings(source="python-docs", validation_blocks=2), seed=1).plan()
