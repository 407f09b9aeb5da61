"""The site: `make site` writes it, without network, to .cache/site."""
