// Runs a converted model from C++: no Python, libtorch and the libraries of fxsparse only.
//
//   run_model FOLDER LIBRARY... [--batch N] [--threads N] [--calls N]
//
// FOLDER is what export.py wrote; the LIBRARY files are fxsparse.capabilities().libraries. Exit code 0 if the outputs
// agree with those that Python computed, 1 if they do not, 2 if something could not be read or run.
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

namespace {

// Of the largest output: float32 sums in another order, on a GPU with TensorFloat-32 in the convolutions of cuDNN.
constexpr double kTolerance = 1e-3;

struct Options {
  std::filesystem::path folder;
  std::vector<std::string> libraries;
  int64_t batch = 0; // 0: as many images as the file has
  int threads = 0;   // 0: as many as torch takes
  int calls = 5;
};

Options parse(const std::vector<std::string> &arguments) {
  Options options;
  std::vector<std::string> files;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].rfind("--", 0) != 0) {
      files.push_back(arguments[i]);
      continue;
    }
    const int value = i + 1 < arguments.size() ? std::atoi(arguments[i + 1].c_str()) : 0;
    if (value < 1)
      throw std::runtime_error(arguments[i] + " needs a number of at least 1");
    if (arguments[i] == "--batch")
      options.batch = value;
    else if (arguments[i] == "--threads")
      options.threads = value;
    else if (arguments[i] == "--calls")
      options.calls = value;
    else
      throw std::runtime_error("There is no option " + arguments[i]);
    ++i;
  }
  if (files.empty())
    throw std::runtime_error("Usage: run_model FOLDER LIBRARY... [--batch N] [--threads N] [--calls N]");
  options.folder = files.front();
  options.libraries.assign(files.begin() + 1, files.end());
  return options;
}

// Loading a library registers its operators. Before the package: that looks the operators up when it is opened.
void load_library(const std::string &path) {
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr)
    throw std::runtime_error(std::string("Could not load a library: ") + dlerror());
}

// Raw float32 in a file, as a tensor whose rows have this shape.
at::Tensor read_rows(const std::filesystem::path &path, const std::string &row_shape) {
  std::vector<int64_t> shape = {0};
  int64_t row = 1;
  std::stringstream sizes(row_shape);
  for (std::string size; std::getline(sizes, size, ',');) {
    shape.push_back(std::stoll(size));
    row *= shape.back();
  }
  std::ifstream file(path, std::ios::binary);
  if (!file)
    throw std::runtime_error("Could not read " + path.string());
  shape[0] = int64_t(std::filesystem::file_size(path)) / (row * int64_t(sizeof(float)));
  at::Tensor rows = at::empty(shape, at::kFloat);
  file.read(static_cast<char *>(rows.mutable_data_ptr()), std::streamsize(rows.nbytes()));
  return rows;
}

int run(const Options &options) {
  if (options.threads > 0)
    at::set_num_threads(options.threads);
  for (const std::string &library : options.libraries)
    load_library(library);

  torch::inductor::AOTIModelPackageLoader model((options.folder / "model.pt2").string());
  auto metadata = model.get_metadata();
  const at::Device device(metadata.at("AOTI_DEVICE_KEY"));
  const at::Tensor images = read_rows(options.folder / "input.f32", metadata.at("input_shape"));
  const at::Tensor outputs = read_rows(options.folder / "expected.f32", metadata.at("output_shape"));

  // Any batch: the images over and over.
  const int64_t batch = options.batch > 0 ? options.batch : images.size(0);
  const at::Tensor index = at::arange(batch).remainder(images.size(0));
  const at::Tensor input = images.index_select(0, index).to(device);
  const at::Tensor expected = outputs.index_select(0, index);

  const c10::InferenceMode inference;
  at::Tensor output;
  std::vector<double> milliseconds;
  for (int call = 0; call <= options.calls; ++call) { // the first is not timed
    const auto start = std::chrono::steady_clock::now();
    output = model.run({input})[0].to(at::kCPU); // waits for a GPU, too
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    if (call > 0)
      milliseconds.push_back(took.count());
  }

  std::printf("device %s, batch %lld, threads %d\n", device.str().c_str(), static_cast<long long>(batch),
              at::get_num_threads());
  std::printf("ms a call:");
  for (const double time : milliseconds)
    std::printf(" %.3f", time);
  const double difference = (output - expected).abs().max().item<double>();
  const double allowed = kTolerance * expected.abs().max().item<double>();
  const bool agrees = difference <= allowed; // false for NaN
  std::printf("\nlargest difference %.3g, allowed %.3g: %s\n", difference, allowed, agrees ? "agrees" : "DISAGREES");
  return agrees ? 0 : 1;
}

} // namespace

int main(int argc, char **argv) {
  try {
    return run(parse({argv + 1, argv + argc}));
  } catch (const c10::Error &error) {
    std::fprintf(stderr, "run_model: %s\n", error.what_without_backtrace());
    return 2;
  } catch (const std::exception &error) {
    std::fprintf(stderr, "run_model: %s\n", error.what());
    return 2;
  }
}
