"""The OpenGL library that MuJoCo renders with, where there is no display."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys

from mmseq.errors import DependencyError


def choose_gl() -> None:
    """Set MUJOCO_GL, unless it is set, to what this machine has: EGL before OSMesa. Only Linux has the choice.

    Raises: DependencyError when there is neither.
    """
    if os.environ.get("MUJOCO_GL") or sys.platform != "linux":
        return
    if _egl_works():
        os.environ["MUJOCO_GL"] = "egl"
    elif _library("libOSMesa.so.8") or _library("libOSMesa.so"):
        os.environ["MUJOCO_GL"] = "osmesa"
    else:
        raise DependencyError(
            "rendering without a display needs EGL or OSMesa, and this machine has neither",
            fix="install one: apt-get install libegl1 libgl1-mesa-dri, or libosmesa6",
        )
    if "mujoco" in sys.modules:
        # imported before the variable was set, it has taken the library that needs a display
        chosen = importlib.import_module(f"mujoco.{os.environ['MUJOCO_GL']}")
        sys.modules["mujoco.gl_context"].GLContext = chosen.GLContext  # type: ignore[attr-defined]


def _library(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _egl_works() -> bool:
    """Whether EGL initialises on some device, asked as MuJoCo asks it."""
    egl = _library("libEGL.so.1")
    if egl is None:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    display_of = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query or not display_of:
        return False
    devices, count = (ctypes.c_void_p * 16)(), ctypes.c_int(0)
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(query)
    display_of = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(display_of)
    if not query(16, devices, ctypes.byref(count)):
        return False
    egl.eglInitialize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    platform_device = 0x313F
    return any(
        (display := display_of(platform_device, devices[i], None)) and egl.eglInitialize(display, None, None)
        for i in range(count.value)
    )
