// What the checks have found, in words: kind, line of the source, block and thread.
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <set>

#include "machine.h"

namespace emu {
namespace {

std::vector<Site>& sites() {
  static std::vector<Site> all{{"the host", 0, nullptr, 0}};
  return all;
}
constexpr size_t kMost = 32;  // reports kept; what follows the first few is mostly their consequence
std::mutex mutex;
std::vector<std::string> found;
std::set<std::pair<std::string, u32>> repeated;

std::string line(const char* file, int number) {
  const char* slash = strrchr(file, '/');
  return std::string(slash ? slash + 1 : file) + ":" + std::to_string(number);
}

}  // namespace

u32 add_sites(const Site* table, u32 count) {
  const u32 first = u32(sites().size());
  sites().insert(sites().end(), table, table + count);
  return first;
}

std::string where(u32 site) {
  const Site& s = sites()[site];
  if (!s.line) return s.file;
  return s.caller_file ? line(s.caller_file, s.caller_line) + " (" + line(s.file, s.line) + ")" : line(s.file, s.line);
}

void report(const Lane* lane, const char* kind, u32 site, const char* format, ...) {
  std::lock_guard turn(mutex);
  if (!repeated.emplace(kind, site).second || found.size() >= kMost) return;
  char text[700];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::string message = std::string(kind) + ": " + (site ? where(site) + ": " : "") + text;
  if (lane) {
    const Dim3 &b = lane->block->index, &t = lane->thread;
    char who[120];
    snprintf(who, sizeof who, " [block (%u,%u,%u) thread (%u,%u,%u)]", b.x, b.y, b.z, t.x, t.y, t.z);
    message += who;
  }
  found.push_back(message);
}

void forget_repeats() {
  std::lock_guard turn(mutex);
  repeated.clear();
}

std::string reports(bool clear) {
  std::lock_guard turn(mutex);
  std::string all;
  for (const std::string& r : found) all += r + "\n";
  if (clear) found.clear(), repeated.clear();
  return all;
}

}  // namespace emu
