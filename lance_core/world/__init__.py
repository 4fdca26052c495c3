"""A small world of coloured shapes: pictures, clips, captions, questions and edits whose truth is known.

What nano-Lance, the built-in model, was trained on and is measured by. Imported only when used.
"""
