"""Parts of the file container: the header of a safetensors file, and files in a file system."""
