# Writes OUT, a header that names the commit of the sources in SOURCE, and touches it only when that changes.
execute_process(COMMAND git -C ${SOURCE} describe --always --dirty --exclude=* --abbrev=12
  OUTPUT_VARIABLE commit ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT commit)
  set(commit unknown)
endif()
file(CONFIGURE OUTPUT ${OUT} CONTENT "#pragma once\nnamespace bench {\ninline constexpr char kCommit[] = \"@commit@\";\n}\n" @ONLY)
