"""Classifies the images of a folder: classify.py MODEL.ONNX FOLDER. Prints a JSON object: the label of each file."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1])
labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
answers = {}
for path in sorted(each for each in Path(sys.argv[2]).iterdir() if each.is_file()):
    image = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))[None]
    probabilities = session.run(["probabilities"], {"images": image})[0][0]
    answers[path.name] = labels[int(probabilities.argmax())]
print(json.dumps(answers))
