"""Other trainers' ways in: a module each, imported by whoever has that trainer. Nothing is imported here."""
