"""What the tests of the app share: gradio, imported as the app imports it, without its stubs."""

from ldm_train.app.serve import without_stubs

with without_stubs():
    import gradio  # noqa: F401
