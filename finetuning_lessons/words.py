"""The two languages of the lessons: English, and the Traditional Chinese of Taiwan.

    choose("zh-TW")
    print(text("picture", "圖片"))  # 圖片

A lesson writes both beside the numbers that they state, and `text` picks one. A picture without a font for Chinese has English
labels, and a list of what they mean below it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LANGUAGES = ("en", "zh-TW")
FONT_PACKAGE = "fonts-noto-cjk"  # of Debian and Ubuntu
# Files of fonts with Traditional Chinese: Noto and Source Han, those of macOS and Windows, and older free ones.
FONT_FILES = re.compile(
    r"(?:NotoSans(?:CJK(?:tc)?|TC|HK)|SourceHanSans(?:TC|TW|HW)?)[-.\[](?:Regular|VF|wght|otf|ttc).*|PingFang.*|msjh\.ttc|mingliu.*|wqy.*|uming.*"
)

# Labels that several lessons share.
LOSS = ("loss (nats a token)", "損失（nats / token）")
HELD_OUT_LOSS = ("held-out loss", "驗證損失")
STEP = ("optimizer step", "訓練步數")
PARAMETERS = ("parameters", "參數量")

_chosen = {"language": "en"}
_labels: list[dict[str, str]] = []  # of the picture that is being drawn without a font for Chinese


def choose(language: str) -> None:
    """Choose the language of `text` from LANGUAGES."""
    _chosen["language"] = language


def chosen_language() -> str:
    return _chosen["language"]


def text(english: str, chinese: str) -> str:
    """Return the one in the chosen language; the English one inside a picture that cannot show Chinese."""
    if chosen_language() == "en":
        return english
    if _labels:
        _labels[-1][english] = chinese
        return english
    return chinese


def percent(number: float, digits: int = 0) -> str:
    """Return "9.20 %", and "9.20%" in Chinese, as it is set in Taiwan."""
    return f"{number:.{digits}f}{text(' %', '%')}"


def find_chinese_font() -> str | None:
    """Return the family of an installed font for Chinese that matplotlib can use, or None."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    for path in sorted(findSystemFonts()):
        if FONT_FILES.fullmatch(Path(path).name):
            fontManager.addfont(path)  # its own list is as old as its cache
            families = [font.name for font in fontManager.ttflist if font.fname == path]
            return next((family for family in families if family.endswith("Sans CJK TC")), families[0])
    return None


@contextmanager
def english_labels() -> Iterator[dict[str, str]]:
    """Let `text` answer in English, as a picture without a font for Chinese needs; yield what was asked, English -> Chinese."""
    _labels.append({})
    try:
        yield _labels[-1]
    finally:
        _labels.pop()
