"""Builds pyengine._C by calling CMake; the build itself is described in CMakeLists.txt alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        source = Path(__file__).resolve().parent
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # Not self.build_temp: an editable install makes that anew each time, and then everything is compiled again.
        build = source / "build" / f"python{sys.version_info.major}.{sys.version_info.minor}"
        configure = [
            "cmake", "-S", str(source), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",  # pip builds with another copy each time
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPYENGINE_CUDA={os.environ.get('PYENGINE_CUDA', 'AUTO')}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(ext_modules=[Extension("pyengine._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
