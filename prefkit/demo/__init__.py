"""The authored world of `prefkit demo`: questions with better and worse answers, and a model small enough for it.

`world` writes the source files and is pure standard library; `tiny_model` stands below the torch line.
"""
