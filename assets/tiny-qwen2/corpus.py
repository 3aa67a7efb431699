"""Write the training text of the embedded model: the prose of CPython's documentation and of its docstrings.

    python corpus.py corpus.txt        # needs CPython 3.11 and Debian's package python3.11-doc; no GPU, no other library

The documentation is reStructuredText. Sentences and headings are kept; code, tables, signatures, credits and repeated paragraphs
are removed. The rules cover the pages of CPython and are no general parser of reStructuredText.
"""

import argparse
import ast
import hashlib
import re
import sysconfig
from pathlib import Path

DEBIAN_DOCS = "/usr/share/doc/python3.11/html/_sources"
DOCUMENT_BREAK = "\n\f\n"  # a line with a form feed separates documents; a blank line separates paragraphs
SKIPPED_PAGE = "license.rst.txt"  # legal text, mostly that of other projects
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}

# Directives whose text is prose, and those whose body is prose below a signature. All others are removed with their body.
PROSE = {
    "note", "Note", "warning", "important", "caution", "seealso", "impl-detail", "topic",
    "versionadded", "versionchanged", "deprecated", "deprecated-removed",
}  # fmt: skip
DESCRIPTIONS = {
    "function", "method", "class", "attribute", "data", "exception", "decorator", "classmethod", "staticmethod", "abstractmethod",
    "coroutinemethod", "coroutinefunction", "awaitablefunction", "awaitablemethod", "member", "macro", "type", "var", "struct",
    "describe", "object", "cmdoption", "envvar", "opcode", "pdbcommand", "glossary",
}  # fmt: skip
DIRECTIVE = re.compile(r"\.\. (?:c:)?([\w-]+)::\s*(.*)")
BULLET = re.compile(r"\s*(?:[*+-]|\d{1,2}[.)]|\([a-z0-9]\)|#\.)\s+(?=\S)")
UNDERLINE = re.compile(r"([=~^\"'*+#.>-])\1{2,}\s*$")
TABLE_BORDER = re.compile(r"\s*=+(?: +=+)+\s*$")
NOT_PROSE = re.compile(r">>>|\.\.\.|:[\w ]+:(\s|$)|[|+]([-=|+ ]|$)|@\w")  # doctests, fields, grids, decorators
INLINE = re.compile(
    r"(?::(?P<role>[\w:+-]+):)?(?<!`)`(?!`)(?P<reference>[^`]+)`_{0,2}"
    r"|``(?P<literal>.+?)``"
    r"|\*\*(?P<strong>\S(?:[^*]*[^\s*])?)\*\*"
    r"|(?<![\w*\\])\*(?P<emphasis>[^\s*](?:[^*]*[^\s*\\])?)\*(?![\w*])"
    r"|(?P<footnote>\s?\[[\w#*]+\]_)"
)
CREDITS = re.compile(r"\s*\((?:[A-Z]\w+|contributed) (?:\w+ ){0,3}by [^()]*(?:\([^()]*\)[^()]*)*\)\.?")
LABELLED_TITLE = re.compile(r"^\.\. _([\w.-]+):\n(?:\n|\.\. .*\n|[=*#]+\n)*(\S.*)\n[=~^\"'*+#-]{3,}$", re.MULTILINE)
BARE_REFERENCE = re.compile(r":ref:`([\w.-]+)`")


def drop_tables(lines: list[str]) -> list[str]:
    """Blank out simple tables: from a border of '===' columns to the border that a blank line follows."""
    kept, in_table = [], False
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if border := TABLE_BORDER.match(line):
            in_table = bool(following.strip())
        kept.append("" if border or in_table else line)
    return kept


def mark_headings(lines: list[str]) -> list[str]:
    """Replace each line above an underline by '# line', and underlines and overlines by blank lines."""
    marked = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if UNDERLINE.match(line):
            marked.append("")
        elif line.strip() and UNDERLINE.match(following):
            marked += ["", "# " + line.strip()]
        else:
            marked.append(line)
    return marked


def drop_blocks(lines: list[str]) -> list[str]:
    """Blank out code, comments and directives, but keep the prose inside directives."""
    kept, skip_deeper_than, skip_to_blank = [], None, False
    for line in lines:
        if bullet := BULLET.match(line):  # an item is a paragraph of its own, as deep as its text
            kept.append("")
            line = " " * bullet.end() + line[bullet.end() :]
        body, indent = line.strip(), len(line) - len(line.lstrip())
        skip_to_blank = skip_to_blank and bool(body)
        if not body or skip_to_blank or (skip_deeper_than is not None and indent > skip_deeper_than):
            kept.append("")
            continue
        skip_deeper_than = indent if body.endswith("::") or body.startswith("..") else None
        if (directive := DIRECTIVE.match(body)) and directive[1] in PROSE:
            text = re.sub(r"^([\d.]+,?(\s+|$))+", "", directive[2])  # versionadded opens with the version's number
            kept += ["", " " * (indent + 3) + text]
            skip_deeper_than = None
        elif directive and directive[1] in DESCRIPTIONS:
            skip_to_blank, skip_deeper_than = True, None  # a signature may take several lines; its body follows
        elif NOT_PROSE.match(body):
            skip_to_blank = True
        elif not body.startswith(".."):
            kept.append(line)
    return kept


def join_paragraphs(lines: list[str]) -> list[str]:
    """Join lines to one string per paragraph. A change of indent also ends a paragraph: a term, then its definition."""
    paragraphs, words, depth = [], [], 0
    for line in [*lines, ""]:
        indent = len(line) - len(line.lstrip())
        if words and (not line.strip() or indent != depth or words[0] == "#"):
            paragraphs.append(" ".join(words))
            words = []
        words += line.split()
        depth = indent
    return paragraphs


def plain_inline(match: re.Match) -> str:
    """Return the visible text of one piece of inline markup."""
    if not match["reference"]:
        return match["literal"] or match["strong"] or match["emphasis"] or ""  # footnote marks vanish
    role = (match["role"] or "").split(":")[-1].lower()
    title = re.match(r"(.*\S)\s*<[^<>]*>$", match["reference"])
    if title:
        return title[1]
    text = match["reference"].lstrip("!")
    text = text.split(".")[-1].lstrip("~") if text.startswith("~") else text
    if role in ("pep", "rfc"):
        return f"{role.upper()} {text}"
    if role in ("issue", "gh"):
        return f"issue {text}"
    if role not in ("", "file"):
        text = text.lstrip(".")  # a search hint to Sphinx
    return text + "()" if role in ("func", "meth") and not text.endswith(")") else text


def strip_markup(paragraph: str) -> str:
    """Return the visible text of a paragraph, without a last sentence that announces code."""
    if paragraph.endswith("::"):
        paragraph = "".join(paragraph.rpartition(". ")[:2]).strip()
    paragraph = re.sub(r"(?<!`)`([\w.-]+)'", r"'\1'", paragraph)  # `old quotes' would pair up as markup
    text = CREDITS.sub("", INLINE.sub(plain_inline, paragraph))
    text = re.sub(r"\\ |\|(release|version)\|", "", text)  # an escaped space joins two words
    text = re.sub(r"\\([*`_|\\<])", r"\1", text)
    return re.sub(r"(?<=\s)---?(?=\s)|(?<=\w)---(?=\w)", "—", text).strip()


def is_prose(paragraph: str) -> bool:
    """Return whether a paragraph is a heading, or sentences with enough words, mostly letters, and English starts and ends."""
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    if paragraph.startswith("# "):
        return letters >= 0.8 * len(paragraph) and len(paragraph) > 5
    ends_well = re.search(r"[a-zA-Z0-9)'\"][.:!?][)'\"]?$", paragraph)
    starts_well = re.match(r"[\"'(]?[A-Z]", paragraph)
    return bool(starts_well and ends_well) and len(paragraph.split()) >= 5 and letters >= 0.87 * len(paragraph)


def clean(text: str, seen: set[str]) -> list[str]:
    """Return the paragraphs of prose that are not yet in `seen`, and add them to it; drop headings without such a paragraph."""
    lines = drop_blocks(mark_headings(drop_tables(text.splitlines())))
    kept = []
    for paragraph in filter(is_prose, map(strip_markup, join_paragraphs(lines))):
        if paragraph.startswith("# "):
            kept = kept[:-1] if kept and kept[-1].startswith("# ") else kept
            kept.append(paragraph)
        elif paragraph not in seen:
            seen.add(paragraph)
            kept.append(paragraph)
    kept = kept[:-1] if kept and kept[-1].startswith("# ") else kept
    return [paragraph.removeprefix("# ") for paragraph in kept]


def read_docstrings(path: Path) -> str:
    tree = ast.parse(path.read_bytes())
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted((n for n in ast.walk(tree) if isinstance(n, owners)), key=lambda n: getattr(n, "lineno", 0))
    return "\n\n".join(ast.get_docstring(node) or "" for node in nodes)


def resolve_references(pages: list[str]) -> list[str]:
    """Replace :ref:`label` by the title of the section below that label, as Sphinx does."""
    titles = {match[1].lower(): match[2].strip() for page in pages for match in LABELLED_TITLE.finditer(page)}
    return [BARE_REFERENCE.sub(lambda m: titles.get(m[1].lower(), m[1]), page) for page in pages]


def read_sources(docs: Path, library: Path):
    """Yield the text of each page and of each module's docstrings, in the order of their sorted paths."""
    paths = sorted(p for p in docs.rglob("*.rst.txt") if p.name != SKIPPED_PAGE)
    if not paths:
        raise FileNotFoundError(f"no *.rst.txt below {docs}. Install Debian's package python3.11-doc, or give --docs")
    yield from resolve_references([path.read_text(encoding="utf-8") for path in paths])
    for path in sorted(library.rglob("*.py")):
        if not SKIPPED_FOLDERS & set(path.relative_to(library).parts):
            yield read_docstrings(path)


def write_corpus(out: Path, docs: Path):
    seen, documents = set(), []
    for text in read_sources(docs, Path(sysconfig.get_path("stdlib"))):
        document = "\n\n".join(clean(text, seen))
        if len(document) >= 300:  # characters; shorter ones are mostly one-line docstrings
            documents.append(document)
    data = DOCUMENT_BREAK.join(documents).encode()
    out.write_bytes(data)
    print(f"{out}: {len(documents)} documents, {len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--docs", type=Path, default=Path(DEBIAN_DOCS), help="folder of the *.rst.txt sources")
    args = parser.parse_args()
    write_corpus(args.out, args.docs)


if __name__ == "__main__":
    main()
