// Marks the functions of the library that csrc/python looks up by name.
#pragma once

#define FPI_API extern "C" __attribute__((visibility("default")))
