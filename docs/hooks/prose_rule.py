"""A rule for pymarkdown, which ``make check`` runs: long sentences, and phrases that a maintainer would not write."""

import re

from pymarkdown.plugin_manager.plugin_details import PluginDetailsV2
from pymarkdown.plugin_manager.plugin_scan_context import PluginScanContext
from pymarkdown.plugin_manager.rule_plugin import RulePlugin
from pymarkdown.tokens.markdown_token import MarkdownToken

MAX_WORDS = 25

# A foreign phrase, and what to write in its place.
PHRASES = {
    r"(is|are|was|were|be) told": "say who reports it",
    r"whoever": "name the reader: you, the launcher, rank 0",
    r"so (many|long) [a-z]+s?\b(?! as)": "give the number or the key",
    r"of (ours|yours)": "our, your",
    r"(goes|go|went) on": "continue",
    r"(is|are|was|were) passed over": "skipped",
    r"has it that": "say",
    r"anew": "again",
    r"(takes|took) (from|away from) there": "say from where",
    r"makes an? \w+ of": "turns into",
}

# What a rule finds and is right all the same: (the page's last part, the beginning of the sentence).
EXCEPTIONS: set[tuple[str, str]] = set()


class ProseRule(RulePlugin):
    """Holds each paragraph, list item and table cell to the rules; code, links' targets and headings are left alone."""

    def __init__(self) -> None:
        super().__init__()
        self._start: MarkdownToken | None = None
        self._text = ""
        self._page = ""

    def get_details(self) -> PluginDetailsV2:
        """What pymarkdown shows beside a finding."""
        return PluginDetailsV2(
            plugin_id="HP001",
            plugin_name="plain-english",
            plugin_description="Plain English",
            plugin_enabled_by_default=True,
            plugin_version="1.0.0",
            plugin_url=None,
            plugin_configuration="",
            plugin_supports_fix=False,
            plugin_fix_level=0,
        )

    def next_token(self, context: PluginScanContext, token: MarkdownToken) -> None:
        """Collects the text of a block, and judges it at its end."""
        if token.is_paragraph or token.is_table_row_item:
            self._start, self._text = token, ""
        elif token.is_paragraph_end or token.is_table_row_item_end:
            self._judge(context)
            self._start = None
        elif token.is_text:
            self._text += token.token_text
        elif token.is_inline_code_span:
            self._text += "code"

    def _judge(self, context: PluginScanContext) -> None:
        text = " ".join(self._text.split())
        for sentence in re.split(r"(?<=[.!?:])[)\"”]*\s+", text):
            if any(context.scan_file.endswith(page) and sentence.startswith(begin) for page, begin in EXCEPTIONS):
                continue
            words = re.findall(r"\w[\w'.,/-]*", sentence)
            if len(words) > MAX_WORDS:
                self._report(context, f"{len(words)} words, at most {MAX_WORDS}: {sentence}")
        for phrase, instead in PHRASES.items():
            if found := re.search(rf"\b{phrase}\b", text, re.IGNORECASE):
                self._report(context, f"{found[0]!r}: {instead}")

    def _report(self, context: PluginScanContext, what: str) -> None:
        self.report_next_token_error(context, self._start, extra_error_information=what)
