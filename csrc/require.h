// Errors in the house's form: the operation, the rule, what was given.
#pragma once

#include <initializer_list>
#include <sstream>
#include <stdexcept>

namespace fpi {

template <class Sizes>
auto write(std::ostream& out, const Sizes& sizes) -> decltype(sizes.begin(), void()) {
  out << '(';
  const char* between = "";
  for (const auto size : sizes) {
    out << between << size;
    between = ", ";
  }
  out << ')';
}
inline void write(std::ostream& out, const char* text) { out << text; }
inline void write(std::ostream& out, int64_t value) { out << value; }
inline void write(std::ostream& out, int value) { out << value; }

template <class... Args>
void require(bool holds, const Args&... parts) {
  if (holds) return;
  std::ostringstream message;
  (write(message, parts), ...);
  throw std::runtime_error(message.str());
}

}  // namespace fpi
