"""How `just docs` makes a site of these pages; they are plain Markdown, and read as well without it."""

from nnunet_vit_mae import __version__

project = "nnunet-vit-mae"
release = __version__
extensions = ["myst_parser"]
myst_heading_anchors = 4  # the same links to headings as where the repository is hosted
html_theme = "furo"
html_title = f"{project} {release}"
html_show_copyright = False
