// The packed weight against the dense one: unpack, repack, and the check of tables that come from outside.
#pragma once

#include <string>

#include "cpu/conv.h"

namespace fxsparse {

// Panels [first, last): packed values into a dense [rows, columns] weight that holds zeros. Elements are moved as
// they are, so any dtype of `element_bytes` (2, 4 or 8) will do.
void unpack_panels(const PackedWeight &packed, int64_t columns, int64_t element_bytes, int64_t first, int64_t last,
                   void *dense);

// The opposite: `values` gets the dense weight at the packed places, and zeros in padding lanes.
void repack_panels(const PackedWeight &packed, int64_t columns, int64_t element_bytes, int64_t first, int64_t last,
                   const void *dense, void *values);

// Returns what is wrong with the tables, or an empty string. Reads nothing outside them, whatever they hold.
std::string describe_invalid_tables(const PackedWeight &packed, int64_t out_channels, int64_t columns,
                                    int64_t group_channels, int64_t groups);

} // namespace fxsparse
