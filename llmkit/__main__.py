"""`python -m llmkit` is `llmkit`."""

from llmkit.cli.main import main

if __name__ == "__main__":
    main()
