# shellcheck shell=sh
# sources.sh NAME OBSOLETE URL CONFLICTS: other lists with the same repository. Prints `file <path>` for what goes whole, `lines <path>` for a list
# with lines of it, `signed <key>` for the key that the repository at URL has in the host's own sources, `key` where NAME's key is there.
set -u
name=$1 obsolete=$2 url=$3 conflicts=$4
folder=/etc/apt/sources.list.d
[ -d "$folder" ] || folder=/etc/yum.repos.d
for file in $obsolete; do
  if [ -e "$folder/$file" ]; then echo "file $folder/$file"; fi
done
if [ -n "$conflicts" ]; then
  for file in /etc/apt/sources.list "$folder"/*; do
    case $file in */"$name".sources | */"$name".repo | *.disabled-by-selfhosted-fastgpt) continue ;; esac
    [ -f "$file" ] || continue
    for listed in $obsolete; do
      if [ "$file" = "$folder/$listed" ]; then continue 2; fi
    done
    case $file in
      *.list) if grep -E '^[[:space:]]*deb' "$file" | grep -qF -e "$conflicts"; then echo "lines $file"; fi ;;
      *.sources | *.repo) if grep -qF -e "$conflicts" "$file"; then echo "file $file"; fi ;;
    esac
  done
fi
if [ -s "/usr/share/keyrings/$name.asc" ]; then echo key; fi
place=${url#*://}
for file in /etc/apt/sources.list "$folder"/*.list "$folder"/*.sources; do
  case $file in */selfhosted-fastgpt-nonfree*) continue ;; esac
  [ -f "$file" ] || continue
  grep -qF -e "$place" "$file" || continue
  found=$(sed -nE 's/^Signed-By: *([^ ]+)$/\1/p; s/^deb .*signed-by=([^] ]+).*/\1/p' "$file" | head -n 1)
  if [ -n "$found" ]; then
    echo "signed $found"
    break
  fi
done
exit 0
