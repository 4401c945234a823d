// How a state or a history is stored.
#pragma once

namespace fpi {

enum class StateType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

}  // namespace fpi
