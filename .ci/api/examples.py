"""Griffe reads `Examples:` as a section with code, and this library writes `Example:`."""

import griffe


class Examples(griffe.Extension):
    """Calls the section what Griffe calls it."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rename the section of one object's docstring."""
        del kwargs
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
