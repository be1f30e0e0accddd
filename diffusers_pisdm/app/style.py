"""Colours and shapes of the page; static/page.css has the rest."""

from __future__ import annotations

import gradio as gr
from gradio.themes.utils import colors, sizes


# Fonts of the visitor's machine: the page loads nothing from elsewhere.
SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

ACCENT = colors.Color(
    c50="#fff4ee",
    c100="#ffe4d5",
    c200="#ffc7aa",
    c300="#ffa274",
    c400="#fb7a43",
    c500="#ea5a1e",
    c600="#c9430f",
    c700="#a43610",
    c800="#832f14",
    c900="#6a2914",
    c950="#391206",
)


def make_theme() -> gr.Theme:
    theme = gr.themes.Base(
        primary_hue=ACCENT,
        secondary_hue=ACCENT,
        neutral_hue=colors.stone,
        radius_size=sizes.radius_lg,
        font=SANS,
        font_mono=MONO,
    )
    return theme.set(
        body_background_fill="#faf8f5",
        body_background_fill_dark="#161412",
        body_text_color="#2a2522",
        body_text_color_dark="#f2ede8",
        body_text_color_subdued="#716860",
        body_text_color_subdued_dark="#a89e95",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#1e1b19",
        background_fill_secondary="#f4f1ec",
        background_fill_secondary_dark="#26221f",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_border_width_dark="0px",
        block_shadow="none",
        block_shadow_dark="none",
        block_padding="0px",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_label_border_width_dark="0px",
        block_title_text_weight="500",
        block_title_text_size="*text_sm",
        border_color_primary="#e6e0d8",
        border_color_primary_dark="#3a3430",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_500",
        button_primary_background_fill_hover_dark="*primary_400",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#1a0a03",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_hover="#f4f1ec",
        button_secondary_background_fill_dark="#26221f",
        button_secondary_background_fill_hover_dark="#322d29",
        button_secondary_border_color="*border_color_primary",
        button_border_width="1px",
        input_background_fill="#ffffff",
        input_background_fill_dark="#1e1b19",
        input_border_width="1px",
        slider_color="*primary_600",
        slider_color_dark="*primary_500",
    )
