"""What makes the docs site beside its pages: files of the repository as pages, commands as a reference, pictures."""
