"""`import hwpoison`: what a person finds who looks at the package itself."""

from __future__ import annotations

import re
import subprocess
import sys

import hwpoison


def test_every_public_name_is_listed_and_explained_and_is_there() -> None:
    assert set(hwpoison.__all__) <= set(dir(hwpoison))
    explained = re.findall(r"^    (\w+)(?:, (\w+))?  +\S", hwpoison.__doc__ or "", re.MULTILINE)
    assert sorted(name for pair in explained for name in pair if name) == sorted(hwpoison.__all__)
    assert all(getattr(hwpoison, name) is not None for name in hwpoison.__all__)


def test_to_list_the_names_loads_nothing() -> None:
    script = "import sys, hwpoison; dir(hwpoison); print(sorted({'numpy', 'msgspec'} & set(sys.modules)))"

    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
