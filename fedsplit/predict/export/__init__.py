"""A module for other programs: merged into a plain transformers model, as an ONNX file, or in Hugging Face's layout.

write.py    the three forms, each checked against the module before its folder appears
merged.py   LoRA, a classifier or a full module as weights of transformers' own model
onnx.py     the ONNX file and its int8 copy; the only file that imports onnxruntime
check.py    inputs on which an export must answer as the module does
card.py     the model card, README.md
"""
