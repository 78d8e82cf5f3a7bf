"""The study: everything that measures. The reference does not import it. README.md says what was found."""
