"""The site of docs/: `make docs` puts it into build/site.

`sources` lays the pages out for Sphinx, with the paths that they have in the repository; `conf` is Sphinx's configuration.
`picture` draws the output of the demonstration.
"""
