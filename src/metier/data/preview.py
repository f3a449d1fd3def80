"""What is trained on, to look at: records as the model sees them, trained tokens in green."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from metier.data.encode import EncodedSet, Item

TRAINED_STYLE = "bold green"
CONTEXT_STYLE = "dim"


def preview(encoded: EncodedSet[Item], tokenizer: PreTrainedTokenizerBase, *, num_records: int = 3) -> RenderableType:
    """Show the first records with their mask, then how many tokens are trained on and what was left out.

    Args:
        encoded: from `encode_records` or `encode_pairs`.
        tokenizer: the one that it was encoded with.
        num_records: how many to show.

    Returns:
        Something that rich's `Console.print` shows.
    """
    legend = Text.assemble(("trained on", TRAINED_STYLE), " · ", ("context only", CONTEXT_STYLE))
    panels = [_panel(item, tokenizer) for item in encoded.items[:num_records]]
    return Group(legend, *panels, _summary(encoded))


def _panel(item: Item, tokenizer: PreTrainedTokenizerBase) -> Panel:
    text = Text()
    # runs are decoded whole: one character may be spread over several tokens
    for is_trained, token_ids in item.parts():
        piece = tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text.append(piece, style=TRAINED_STYLE if is_trained else CONTEXT_STYLE)
    counts = f"{item.num_trained_tokens:,} of {item.num_tokens:,} tokens trained on"
    return Panel(text, title=Text(item.origin), title_align="left", subtitle=counts, subtitle_align="left")


def _summary(encoded: EncodedSet[Item]) -> Text:
    share = encoded.num_trained_tokens / max(encoded.num_tokens, 1)
    text = Text(
        f"{len(encoded.items):,} records, {encoded.num_tokens:,} tokens, {encoded.num_trained_tokens:,} "
        f"trained on ({share:.1%}); longest {encoded.longest_tokens:,} of max_length {encoded.max_length:,}."
    )
    if report := encoded.report():
        text.append(f"\n{report}", style="yellow")
    return text
