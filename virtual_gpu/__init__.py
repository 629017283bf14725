"""A GPU in software: runs what the compiler made of the kernels, behind the launcher itself."""
