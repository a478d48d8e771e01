#!/bin/sh
# Builds the CUDA kernels for the GPU of this machine, tests them and times them, in eight minutes:
#
#     benchmarks/first_contact.sh [--out FOLDER] [--help]
#
# Needs python3 with torch, nvcc and ninja; nothing is installed. PYTHON chooses the interpreter.
cd "$(dirname "$0")/.." || exit
exec "${PYTHON:-python3}" -m benchmarks.first_contact "$@"
