"""Imports gradio for all tests of the app, in the way the app does: without its stub files."""

from ldm_train.app.serve import without_stubs

with without_stubs():
    import gradio  # noqa: F401
