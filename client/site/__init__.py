"""What runs at a hospital."""

import os

# Before the first product: left alone, MKL may choose other kernels for some rows of a matrix than
# for the others, and round a patient by the place in the pass (seen on an EPYC with AVX-512). The
# proof of the clipped sum then asks for one patient per pass, several times as slow. Asked for
# reproducible results, MKL treats rows alike.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
