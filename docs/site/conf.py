"""Sphinx's configuration: Markdown as GitHub reads it, nothing from the network."""

project = "kvplane"
html_title = "kvplane"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "index"
# GitHub gives every heading an anchor; links to them are checked.
myst_heading_anchors = 6
myst_enable_extensions = ["html_image"]
# Blocks that are marked with a language are that; others are a terminal or a drawing.
highlight_language = "text"
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_use_index = False
html_show_sphinx = False
