# Sourced: the ten ImageNet classes of each similarity level of the multi-source study (arXiv 2502.14583); 171 is in all.
similarity_classes() {
    case "$1" in
        sim3) echo 171 182 198 208 215 231 236 244 245 258 ;;
        sim2) echo 171 269 279 283 294 330 340 366 370 386 ;;
        sim1) echo 171 1 18 31 46 532 579 609 849 980 ;;
        *) echo "Error: the similarity level must be sim1, sim2 or sim3, not $1" >&2; return 1 ;;
    esac
}
