"""The core suites in environments with other versions of Python, torch and transformers, and docs/versions.md from them."""
