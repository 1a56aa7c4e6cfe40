"""Classical registration of two slices, in a process of its own that ``competitors`` starts.

This file is also run by interpreters that have no bsafusion (ANTs and elastix pin libraries of their own), so it
imports nothing but the standard library, numpy and, inside its functions, the one library that a method needs.

It reads one JSON request a line and answers each with one JSON line:

- ``{"method": NAME}`` asks for the versions of what the method needs, and what it is given: ``{"versions": {...},
  "parameters": {...}}``;
- ``{"method": NAME, "fixed": A, "moving": B, "out": C}``, all ``.npy`` files, registers two images ``H W`` float32 in
  [0, 1]: ``{"seconds": s}`` (CPU time), and ``C`` holds the field, ``2 H W`` float32.

An answer ``{"error": ...}`` says why there is none. Fields are in the package's one convention (``deformation``):
pull-back on the fixed grid, ``aligned(x) = moving(x + u(x))``, voxels, components ``(y, x)``. Images have spacing 1 and
origin 0, so physical points are pixels. Every method uses mutual information with fixed seeds, and one thread: its
field depends on nothing but its input.
"""

# mypy: allow-untyped-calls
# (the libraries have no types)

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

SEED = 1

PARAMETERS: dict[str, dict[str, Any]] = {
    "identity": {},
    "sitk-rigid": {
        "transform": "Euler2D",
        "start": "centres of the images on each other; the best of several angles",
        "start_degrees": [-15, 0, 15],
        "metric": "Mattes mutual information, 32 bins, every pixel",
        "shrink": [8, 4, 2, 1],
        "smoothing_sigma": [4.0, 2.0, 1.0, 0.5],
        "optimizer": "regular step gradient descent, scales from physical shift",
        "learning_rate": 4.0,
        "minimum_step": 1e-3,
        "relaxation": 0.8,
        "iterations": 200,
    },
    "sitk-bspline": {
        "start": "sitk-rigid",
        "transform": "B-spline of order 3",
        "mesh": [4, 4],
        "metric": "Mattes mutual information, 32 bins, every pixel",
        "shrink": [4, 2],
        "smoothing_sigma": [2.0, 1.0],
        "optimizer": "L-BFGS-B",
        "gradient_tolerance": 1e-5,
        "iterations": 30,
    },
    "elastix": {
        "maps": ["rigid", "affine", "bspline"],
        "metric": "AdvancedMattesMutualInformation",
        "NumberOfResolutions": 3,
        "MaximumNumberOfIterations": 256,
        "NumberOfSpatialSamples": 4096,
        "FinalGridSpacingInPhysicalUnits": 32,
        "RandomSeed": SEED,
    },
    "ants": {
        "type_of_transform": "SyNRA",
        # Centres of mass, ANTsPy's own start, lie far apart where a PET slice shows the brain alone.
        "initial_transform": "identity",
        "aff_metric": "mattes",
        "aff_random_sampling_rate": 1.0,
        "syn_metric": "mattes",
        "syn_sampling": 32,
        "reg_iterations": [40, 20, 0],
        "grad_step": 0.2,
        "flow_sigma": 3,
        "total_sigma": 0,
        "random_seed": SEED,
    },
}
"""What each method is given, recorded with its results."""

LIBRARIES = {"identity": (), "sitk-rigid": ("SimpleITK",), "sitk-bspline": ("SimpleITK",)} | {
    "elastix": ("itk-elastix", "itk-core"),
    "ants": ("antspyx",),
}
"""Distributions whose versions are recorded."""


def identity(fixed: Array, moving: Array) -> Array:
    """What a user has before any registration."""
    return np.zeros((2, *fixed.shape), dtype=np.float32)


# --- SimpleITK ---------------------------------------------------------------------------------------


def sitk_rigid(fixed: Array, moving: Array) -> Array:
    return _sitk_field(_sitk_rigid(fixed, moving), fixed.shape)


def _sitk_rigid(fixed: Array, moving: Array) -> Any:
    import SimpleITK as sitk

    options = PARAMETERS["sitk-rigid"]
    images = [sitk.GetImageFromArray(image) for image in (fixed, moving)]
    found = []
    for degrees in options["start_degrees"]:
        start = sitk.Euler2DTransform(
            sitk.CenteredTransformInitializer(
                *images, sitk.Euler2DTransform(), sitk.CenteredTransformInitializerFilter.GEOMETRY
            )
        )
        start.SetAngle(math.radians(degrees))
        method = _sitk_method(options)
        method.SetOptimizerAsRegularStepGradientDescent(
            learningRate=options["learning_rate"],
            minStep=options["minimum_step"],
            numberOfIterations=options["iterations"],
            relaxationFactor=options["relaxation"],
        )
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetInitialTransform(start, inPlace=False)
        transform = method.Execute(*images)
        found.append((method.GetMetricValue(), transform))
    return min(found, key=lambda pair: pair[0])[1]


def sitk_bspline(fixed: Array, moving: Array) -> Array:
    import SimpleITK as sitk

    options = PARAMETERS["sitk-bspline"]
    images = [sitk.GetImageFromArray(image) for image in (fixed, moving)]
    rigid = _sitk_rigid(fixed, moving)
    bspline = sitk.BSplineTransformInitializer(images[0], options["mesh"], order=3)
    method = _sitk_method(options)
    method.SetOptimizerAsLBFGSB(
        gradientConvergenceTolerance=options["gradient_tolerance"], numberOfIterations=options["iterations"]
    )
    method.SetMovingInitialTransform(rigid)
    method.SetInitialTransform(bspline, inPlace=True)
    method.Execute(*images)
    # The transform added last is applied first: a fixed point through the B-spline, then through the rigid one.
    return _sitk_field(sitk.CompositeTransform([rigid, bspline]), fixed.shape)


def _sitk_method(options: dict[str, Any]) -> Any:
    import SimpleITK as sitk

    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=32)
    method.SetMetricSamplingStrategy(method.NONE)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetShrinkFactorsPerLevel(options["shrink"])
    method.SetSmoothingSigmasPerLevel(options["smoothing_sigma"])
    return method


def _sitk_field(transform: Any, shape: tuple[int, ...]) -> Array:
    import SimpleITK as sitk

    field = sitk.TransformToDisplacementField(transform, sitk.sitkVectorFloat64, size=shape[::-1])
    return _from_itk(sitk.GetArrayFromImage(field))


def _from_itk(field: NDArray[Any]) -> Array:
    """``H W 2`` with components ``(x, y)`` -> ``2 H W`` with components ``(y, x)``."""
    return np.ascontiguousarray(np.moveaxis(field[..., ::-1], -1, 0), dtype=np.float32)


# --- elastix -----------------------------------------------------------------------------------------


def elastix(fixed: Array, moving: Array) -> Array:
    import itk

    options = PARAMETERS["elastix"]
    images = [itk.image_view_from_array(image) for image in (fixed, moving)]
    parameters = itk.ParameterObject.New()
    for name in options["maps"]:
        given = parameters.GetDefaultParameterMap(name, options["NumberOfResolutions"])
        for key in ("MaximumNumberOfIterations", "NumberOfSpatialSamples", "RandomSeed"):
            given[key] = [str(options[key])]
        given["Metric"] = [options["metric"], *given["Metric"][1:]]
        if name == "bspline":
            given["FinalGridSpacingInPhysicalUnits"] = [str(options["FinalGridSpacingInPhysicalUnits"])]
        given["WriteResultImage"] = ["false"]
        parameters.AddParameterMap(given)
    _, found = itk.elastix_registration_method(*images, parameter_object=parameters, log_to_console=False)
    field = itk.transformix_deformation_field(images[1], found)
    return _from_itk(itk.array_from_image(field))


# --- ANTs --------------------------------------------------------------------------------------------


def ants(fixed: Array, moving: Array) -> Array:
    import ants as library

    options = dict(PARAMETERS["ants"])
    options["reg_iterations"] = tuple(options["reg_iterations"])
    # ANTsPy lets the array's first axis be the first physical axis, so its components come as (y, x).
    images = [library.from_numpy(np.ascontiguousarray(image)) for image in (fixed, moving)]
    with tempfile.TemporaryDirectory() as folder:
        found = library.registration(*images, outprefix=f"{folder}/", **options)
        composed = library.apply_transforms(*images, found["fwdtransforms"], compose=f"{folder}/whole")
        field = library.image_read(composed).numpy()
    return np.ascontiguousarray(np.moveaxis(field, -1, 0), dtype=np.float32)


METHODS: dict[str, Callable[[Array, Array], Array]] = {
    "identity": identity,
    "sitk-rigid": sitk_rigid,
    "sitk-bspline": sitk_bspline,
    "elastix": elastix,
    "ants": ants,
}


# --- requests ----------------------------------------------------------------------------------------


def _load(name: str) -> None:
    """Import what a method needs, so that no pair's time has a part of it."""
    if name.startswith("sitk"):
        importlib.import_module("SimpleITK")
    elif name == "ants":
        importlib.import_module("ants")
    elif name == "elastix":
        itk = importlib.import_module("itk")
        for lazy in ("ParameterObject", "elastix_registration_method", "transformix_deformation_field"):
            getattr(itk, lazy)  # their modules are imported when they are asked for


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    name = request["method"]
    if "fixed" not in request:
        versions = {library: importlib.metadata.version(library) for library in LIBRARIES[name]}
        _load(name)
        return {"versions": versions, "parameters": PARAMETERS[name]}
    images = [np.load(request[role], allow_pickle=False) for role in ("fixed", "moving")]
    started = time.process_time()  # of one thread: other programs do not slow it down
    field = METHODS[name](*images)
    seconds = time.process_time() - started
    if field.shape != (2, *images[0].shape) or not np.isfinite(field).all():
        raise RuntimeError(f"{name} gave a field of shape {field.shape} or one that is not finite")
    np.save(request["out"], field)
    return {"seconds": seconds}


def main() -> None:
    # The libraries print; what they print goes to stderr, so that answers have stdout to themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line))
        except Exception as error:  # whatever a library raises, the next pair may do well
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
