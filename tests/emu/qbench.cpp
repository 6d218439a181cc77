// qbench as a function of the emulated module, so that its host code runs with the emulated kernels.
int qbench_main(int argc, char** argv);

extern "C" __attribute__((visibility("default"))) int emu_qbench(int argc, char** argv) { return qbench_main(argc, argv); }
